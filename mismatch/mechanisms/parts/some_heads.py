"""Some heads of an attention from a mechanism, the others from the attention itself.

    a_h = attention(x)_h   or   mechanism_i(x)_h    for each query head h, in front of the output projection
    y   = W_o [a_0, ..., a_{H-1}] + b_o             the attention's own, once

Both run over an attention whose output projection is taken out, so each gives its heads flat, `batch pos H*D`; of those
every head is taken from one of them. So `zero` is heads that add nothing, `mean` their mean in front of the projection,
`random` redraws queries, keys and values and keeps the projection. At the mechanism's identity limit this is the
attention.

Each is built from all projections and runs over all heads: inherited tensors are the same Parameters in both, so that
training the one trains the other, and a kv head that serves heads of both is kept by both. What it costs is the sum of
both, in time and in the cache, whose entry becomes one for each (`side_by_side.py`). Of the attention's entry only
those kv heads are kept that its heads read. Where no head is left to the attention, it is gone.

Several mechanisms in other heads of one layer stand side by side, in the order of the swap.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context, Mechanism
from mismatch.mechanisms.parts.calling import first_of
from mismatch.mechanisms.parts.linears import grafted, stand_in
from mismatch.mechanisms.parts.projections import AttentionParts
from mismatch.mechanisms.parts.side_by_side import SomeKVHeads, side_by_side
from mismatch.models.layout import of_all_layers
from mismatch.spec.heads import said

if TYPE_CHECKING:
    from mismatch.spec import Call

DROPOUT = "resid_dropout"
"""gpt2 drops out behind its output projection, inside the attention."""


@dataclass(frozen=True)
class SomeHeadsConfig:
    inner: Call
    """The mechanism in the heads."""
    heads: tuple[int, ...]
    """Query heads, ascending."""


class SomeHeads(Mechanism):
    """The attention, and a mechanism in some of its heads. Of one that is there already: one more mechanism.

    Attributes:
        original: the attention without its output projection; None: no head is left to it.
        parts: the mechanisms.
        taken: the heads of each.
        paths: what runs: the attention, where it has heads, and the mechanisms.
    """

    Config = SomeHeadsConfig
    slots = ("attn", "rope")
    identity = "that of the mechanism"
    state = "the mechanism's; of the other heads the host's KV cache"
    source = "this package"
    original: nn.Module | None
    parts: nn.ModuleList
    taken: tuple[tuple[int, ...], ...]

    def __init__(self, original: nn.Module, config: SomeHeadsConfig, context: Context) -> None:
        """Raises:
        SurgeryError: built outside surgery; no attention of the model's own, or one that is not known.
        """
        super().__init__(original, config, context)
        if context.build is None:
            raise SurgeryError(
                f"heads at {context.where} nest `{config.inner}`, and nothing can build it",
                hint="build it through mismatch.swap",
            )
        before: SomeHeads | None = original if isinstance(original, SomeHeads) else None
        if before is None:
            facts = AttentionParts(original, None, context)
            own = {"head_dim": facts.head_dim, "num_key_value_heads": facts.n_kv_heads}
            if facts.grouped and any(
                of_all_layers(context.model_config, name) not in (None, value)
                for name, value in own.items()
            ):  # gemma4
                raise SurgeryError(
                    f"{context.where}: the heads of this layer are others than the model's config says",
                    hint="replace the whole attention of this layer, or heads of another one",
                )
            self.n_heads, self.head_dim, self.group = facts.n_heads, facts.head_dim, facts.group
            self.rotates, self._output = facts.rotates, facts._output
            host, owner = headless(original, self._output), original
        else:
            assert before.original is not None  # a head that is free is the attention's
            self.n_heads, self.head_dim, self.group = before.n_heads, before.head_dim, before.group
            self.rotates, self._output = before.rotates, before._output
            host, owner = before.original, before
        made = context.build(config.inner, grafted(host))
        for module in made.modules():
            if isinstance(module, Mechanism):
                module.used_heads = config.heads
        self.original = host  # first, so that shared tensors are named after it
        self.parts = nn.ModuleList([*([] if before is None else before.parts), made])
        self.taken = (*(() if before is None else before.taken), config.heads)
        if sum(map(len, self.taken)) == self.n_heads:
            self.original = None
        setattr(self, self._output, getattr(owner, self._output))
        if isinstance(getattr(owner, DROPOUT, None), nn.Module):
            self.resid_dropout = getattr(owner, DROPOUT)
        self._runs = self._in_runs()

    @property
    def paths(self) -> list[nn.Module]:
        return [*(() if self.original is None else (self.original,)), *self.parts]

    def by_path(self) -> list[tuple[nn.Module, tuple[int, ...]]]:
        """Each path with its heads."""
        gone = {head for heads in self.taken for head in heads}
        own = tuple(head for head in range(self.n_heads) if head not in gone)
        return list(zip(self.paths, [own, *self.taken][-len(self.paths) :], strict=True))

    def _in_runs(self) -> list[tuple[int, int, int]]:
        """For neighbouring heads of one path: its number, and where they start and stop in the flat heads."""
        shift = 0 if self.original is None else 1
        owner = {head: at + shift for at, heads in enumerate(self.taken) for head in heads}
        runs = []
        for path, group in groupby(range(self.n_heads), lambda head: owner.get(head, 0)):
            heads = list(group)
            runs.append((path, heads[0] * self.head_dim, (heads[-1] + 1) * self.head_dim))
        return runs

    def notes(self) -> tuple[str, ...]:
        """Of the mechanism that came last."""
        heads = self.taken[-1]
        split = {h // self.group for h in heads} & {
            h // self.group for h in range(self.n_heads) if h not in heads
        }
        notes = [f"{said(heads)} of {self.n_heads}; runs over all heads, beside the others"]
        if split:
            notes.append(f"kept for both, since other heads read it too: kv {said(sorted(split))}")
        return (*notes, *self.newest.notes())

    @property
    def newest(self) -> Mechanism:
        """The mechanism that came last."""
        last = self.parts[-1]
        assert isinstance(last, Mechanism)
        return last

    def state_beside(self) -> str:
        """What generate() carries for the mechanism that came last, and for the attention beside it."""
        own = f"for {said(self.taken[-1])}: {type(self.newest).state}"
        if self.original is None:
            return own
        return f"{own}; for the attention's own heads: kv {said(self.reads)} of the host's KV cache, apart"

    def gates(self) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for at, part in enumerate(self.parts):
            assert isinstance(part, Mechanism)
            for name, gate in part.gates().items():
                found[name if name not in found else f"{name} {at}"] = gate
        return found

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """As the attention it replaces: `batch pos d_model` in, (`batch pos d_model`, None) out."""
        layer = self.context.layer
        outputs = side_by_side(self.paths, layer, args, kwargs, "these heads", self._entry)
        flat = [first_of(output) for output in outputs]
        heads = torch.cat([flat[path][..., start:stop] for path, start, stop in self._runs], dim=-1)
        out = getattr(self, self._output)(heads)
        return (self.resid_dropout(out) if DROPOUT in self._modules else out), None

    def _entry(self, empty: Any) -> Any:
        """The cache entry of the first path: of the attention it keeps those kv heads that its heads read."""
        if self.original is None or len(self.reads) * self.group == self.n_heads:
            return empty
        # A static cache may have made room for all of them already.
        return empty if empty.is_initialized else SomeKVHeads(empty, self.reads)

    @property
    def reads(self) -> list[int]:
        """The kv heads that the attention's own heads read."""
        gone = {head for heads in self.taken for head in heads}
        return sorted({h // self.group for h in range(self.n_heads) if h not in gone})

    def extra_repr(self) -> str:
        return ", ".join([self.context.where, *map(said, self.taken)])


def headless(attention: nn.Module, output: str) -> nn.Module:
    """The attention over the same tensors, without the output projection of that name: it gives its heads flat."""
    fresh = grafted(attention)
    stand_in(fresh, output, nn.Identity())
    if isinstance(getattr(fresh, DROPOUT, None), nn.Module):
        setattr(fresh, DROPOUT, nn.Dropout(0.0))
    return fresh
