"""The sites: what is measured, and the module at which each is captured.

| site | what | TransformerLens | nnterp |
|---|---|---|---|
| `resid_pre` | the stream entering a block | `blocks.i.hook_resid_pre` | `layers_input[i]` |
| `attn_out` | what attention ADDS to the stream | `hook_attn_out` | `attentions_output[i]` |
| `resid_mid` | the stream between attention and MLP; absent where both read the same stream | `hook_resid_mid` | - |
| `mlp_out` | what the MLP ADDS to the stream | `hook_mlp_out` | `mlps_output[i]` |
| `resid_post` | the stream leaving a block, before any final norm | `hook_resid_post` | `layers_output[i]` |
| `final` | the output of the final norm | `ln_final` | - |
| `logits` | the output of the head | `logits` | `logits` |

`hidden_states` of transformers is never used: its last entry is already final-normed, and after surgery entries go
missing without a warning (they are recorded by class, and a swapped module is of another class).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mismatch.models.layout import Layout

MASSIVE = 10.0
"""Times the median norm of its window: a token above it is massive."""


@dataclass(frozen=True)
class Tap:
    """One value of one block: the input or the output of a module."""

    layer: int
    site: str
    path: str
    """Of the module, relative to its block; "" is the block itself."""
    side: str
    """"in" or "out"."""

    @property
    def enters(self) -> int | None:
        """The block whose input this is, if any."""
        if self.site == "resid_post":
            return self.layer + 1
        return 0 if self.site == "resid_pre" and self.layer == 0 else None

    def module(self, layout: Layout) -> nn.Module:
        """The module of a model that this tap is at."""
        return layout.blocks[self.layer].get_submodule(self.path)


def taps(layout: Layout, layer: int, *, inner: bool = True) -> tuple[Tap, ...]:
    """The taps of one block, in computation order.

    Args:
        layout: of the model that will run.
        layer: 0-based.
        inner: False for a block that was replaced as a whole: the modules inside no longer add to the stream, so
            only `resid_pre` and `resid_post` apply.
    """
    family = layout.family
    found = [Tap(layer, "resid_pre", "", "in")]
    if inner and layer not in layout.whole_blocks:
        found.append(Tap(layer, "attn_out", layout.site_path(layer, "attn_out"), "out"))
        if not layout.parallel:
            found.append(Tap(layer, "resid_mid", family.resid_mid, "in"))
        found.append(Tap(layer, "mlp_out", layout.site_path(layer, "mlp_out"), "out"))
    found.append(leaving(layer))
    return tuple(found)


def leaving(layer: int) -> Tap:
    """The tap of the stream that leaves a block; the same in every model."""
    return Tap(layer, "resid_post", "", "out")


def tensor_of(value: Any) -> Tensor:
    """The tensor of a module's input or output: modules return it bare or first in a tuple."""
    return value[0] if isinstance(value, tuple) else value


def before(layout: Layout, site: str) -> str | None:
    """The stream that an update is added to: for `attn_out` resid_pre, for `mlp_out` resid_mid (or resid_pre)."""
    if site == "attn_out":
        return "resid_pre"
    if site == "mlp_out":
        return "resid_pre" if layout.parallel else "resid_mid"
    return None


def tapped(layout: Layout, sites: Collection[str]) -> frozenset[str]:
    """The sites that must be read for these to be measured: the stream that an update is added to, too, and for the
    stream entering a block the one leaving the block before, which has the same numbers."""
    added = {before(layout, site) for site in sites} - {None}
    return frozenset({*sites, *added, *(("resid_post",) if "resid_pre" in sites else ())})


def massive(x: Tensor, valid: Tensor) -> Tensor:
    """Tokens whose norm is above 10 times the median norm of their own document window.

    The attention sink at position 0 of SmolLM2 has a norm 180 times the median and would dominate every second moment.
    The rule uses one row alone, so it does not depend on the batch. (Sun et al., arXiv 2402.17762, define massive by
    channel; this is the per-token consequence of it.)

    Args:
        x: `batch pos d_model`.
        valid: bool `batch pos`, real tokens.

    Returns:
        bool `batch pos`.
    """
    norms = x.float().norm(dim=-1).masked_fill(~valid, float("nan"))
    return norms > MASSIVE * norms.nanmedian(dim=-1, keepdim=True).values
