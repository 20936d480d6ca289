"""Queries, keys and attention weights of a layer, computed beside the running model.

The model's own attention is observed at its call, inside all wrappers: it then gets the mask and the rotary embedding
that the wrappers made (`nope`, `sliding_window`), so the weights are those it computes. A mechanism that has no
attention weights (a recurrence, a memory) is not observed: not applicable. transformers' `output_attentions` is not
used: it loses entries after surgery without a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.forward.shared_prefix import finals
from mismatch.mechanisms.base import Context, Mechanism, innermost
from mismatch.mechanisms.parts.calling import hidden_in
from mismatch.mechanisms.parts.projections import AttentionParts
from mismatch.mechanisms.parts.some_heads import SomeHeads
from mismatch.models.layout import Layout
from mismatch.probes.base import Subject

HIDDEN = -1e4
"""An added mask below this hides a key: far from 0, and above the lowest number of float16."""


@dataclass(frozen=True)
class Observed:
    """One call of one layer's attention.

    Attributes:
        layer: 0-based.
        q: `batch H pos D`, rotated.
        k: `batch KV pos D`, rotated.
        parts: scaling, softcap, heads.
        mask: bool `batch or 1, 1, pos, pos`, True = may be read.
        angles: the rotation of each pair of channels from one position to the next, radians, float64 `pairs`: the
            frequencies that this layer actually uses; None without a rotary embedding.
        heads: the query heads of which this attention gives the output; None: all.
    """

    layer: int
    q: Tensor
    k: Tensor
    parts: AttentionParts
    mask: Tensor
    angles: Tensor | None
    heads: tuple[int, ...] | None = None

    def weights(self) -> Tensor:
        """Attention weights, float32 `batch H pos pos`; rows sum to 1."""
        scores = self.scores(slice(None))
        if self.parts.softcap is not None:
            scores = torch.tanh(scores / self.parts.softcap) * self.parts.softcap
        return scores.masked_fill(~self.mask, float("-inf")).softmax(-1)

    def scores(self, channels: Any) -> Tensor:
        """The share of some channels of the heads in the scores, before mask and softcap, float32
        `batch H pos pos`."""
        q, k = self.q[..., channels].float(), self.k[..., channels].float()
        return q @ self.parts.per_query_head(k).transpose(-1, -2) * self.parts.scaling


def host_attentions(subject: Subject, layer: int) -> list[tuple[nn.Module, tuple[int, ...] | None]]:
    """The model's own attention in a layer, inside all wrappers, and the heads that it gives (None: all).

    Several where some heads were replaced; none where a mechanism replaced it.
    """
    if layer in subject.whole_blocks:
        return []
    layout = subject.layout
    found = innermost(layout.model.get_submodule(layout.slot_path(layer, "attn")))
    if isinstance(found, SomeHeads):
        pairs = [(innermost(path), heads) for path, heads in found.by_path()]
        return [(path, heads) for path, heads in pairs if not isinstance(path, Mechanism)]
    return [] if isinstance(found, Mechanism) else [(found, None)]


@contextmanager
def observing(
    subject: Subject,
    layers: Sequence[int],
    visit: Callable[[Observed], None],
    some_heads: bool = False,
) -> Iterator[frozenset[int]]:
    """While the context lives, call `visit` at each call of the attention of these layers.

    Args:
        subject: whose.
        layers: 0-based.
        visit: is told of each call.
        some_heads: also where an attention gives some heads only; else such a layer cannot be observed.

    Yields:
        The layers that can be observed.
    """
    with ExitStack() as stack:
        observed = set()
        calls = [(layer, *one) for layer in layers for one in host_attentions(subject, layer)]
        for layer, attention, heads in calls:
            parts = _parts(subject.layout, layer, attention)
            if parts is None or (heads is not None and not some_heads):
                continue
            observed.add(layer)

            def look(
                _module: nn.Module,
                args: tuple,
                kwargs: dict,
                layer: int = layer,
                parts: AttentionParts = parts,
                heads: tuple[int, ...] | None = heads,
            ) -> None:
                seen = _observed(layer, parts, hidden_in(args, kwargs), kwargs)
                visit(replace(seen, heads=heads))

            stack.callback(attention.register_forward_pre_hook(look, with_kwargs=True).remove)
        yield frozenset(observed)


def _parts(layout: Layout, layer: int, attention: nn.Module) -> AttentionParts | None:
    context = Context(layer, "attn", layout.n_layers, layout.d_model, layout.config, layout.family)
    try:
        # It only uses the projections of the module; it is in no model's tree.
        return AttentionParts(attention, None, context)
    except SurgeryError:
        return None  # an adapter inside it, or an unknown class of attention


def _observed(layer: int, parts: AttentionParts, x: Tensor, kwargs: dict[str, Any]) -> Observed:
    with torch.no_grad():
        q, k, _ = parts.qkv(x)
        rotary = kwargs.get("position_embeddings")
        q, k = parts.rotate(q, k, rotary)
    given, size = kwargs.get("attention_mask"), x.shape[1]
    if given is None:
        mask = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()[None, None]
    else:
        # Eager attention gets numbers to add: 0, or the lowest of the dtype.
        mask = given[..., :size] if given.dtype == torch.bool else given[..., :size] > HIDDEN
    angles = None
    if rotary is not None and parts._rotary is not None:
        angles = _angles(*rotary)
    return Observed(layer, q, k, parts, mask, angles)


def _angles(cos: Tensor, sin: Tensor) -> Tensor:
    """From position 0 to 1. cos and sin hold each frequency twice, one half after the other."""
    half = cos.shape[-1] // 2
    turn = torch.atan2(sin[0, :2, :half].double(), cos[0, :2, :half].double())
    return (turn[1] - turn[0]).cpu()


def observe_all(
    subjects: Sequence[Subject],
    ids: Tensor,
    layers: Sequence[int],
    visit: Callable[[str, Observed], None],
    some_heads: bool = False,
) -> dict[str, frozenset[int]]:
    """Run every subject on one batch and call `visit` (name, observation) for each observed layer.

    A student's blocks in front of its swap are the teacher's and do not run again: the teacher's observation is the
    student's too.

    Returns:
        The layers of each subject that have attention weights, those in front of its swap included.
    """
    found: dict[str, frozenset[int]] = {}
    with ExitStack() as stack:
        for subject in subjects:
            own = [
                layer
                for layer in layers
                if subject.name == subjects[0].name or layer >= subject.start
            ]
            mine = partial(visit, subject.name)
            found[subject.name] = stack.enter_context(observing(subject, own, mine, some_heads))
        for _ in finals(subjects, ids):
            pass
    first = found[subjects[0].name]
    return {
        subject.name: found[subject.name] | {layer for layer in first if layer < subject.start}
        for subject in subjects
    }
