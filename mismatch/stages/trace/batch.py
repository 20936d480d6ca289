"""One batch: teacher and student at each site as pairs of the metrics, final states as logits. Lives for one batch.

Masks. `valid`: every token that counts; of a plain text all do, for windows are full. `bulk`: without position 0 and
without massive tokens of the teacher at that site, for they would rule every second moment. `sample`: a seeded part of
bulk, so that second moments cost the same whatever the length of the run: some tokens of every window, or of long runs
`TOGETHER` tokens of some windows.

Logits are never kept: the final states go through the head in chunks of tokens, the teacher's chunk once for all
students; a few tokens of each window go through it at every layer (logit lens, with the model's own final norm).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mismatch.forward.head import Predictions, chunk_of, compare
from mismatch.forward.paired_sites import SitePair
from mismatch.forward.sites import before, massive
from mismatch.metrics.base import LogitPair, Pair
from mismatch.models.layout import Layout
from mismatch.runs.table import FLOOR, MAIN
from mismatch.stages.trace.address import NO_LAYER, TEACHER, Address

if TYPE_CHECKING:
    from mismatch.stages.trace.meters import Collector

LENS_TOKENS = 4  # tokens of each window that go through the head at every layer
TOGETHER = 64  # sampled tokens of a window at least: CKA of groups needs tokens of one window


class Batch:
    """Everything that lives for one batch."""

    def __init__(
        self,
        collector: Collector,
        ids: Tensor,
        docs: Tensor,
        numbers: Sequence[int],
        scored: Tensor | None,
        teacher: Layout,
    ) -> None:
        self.collector, self.ids, self.docs, self.teacher = collector, ids, docs, teacher
        self.pairs: dict[Address, Pair] = {}
        self.streams: dict[tuple[str, str], tuple[str, Tensor, Tensor]] = {}
        self.finals: dict[str, dict[str, Tensor]] = {}
        self.lens: dict[int, dict[str, Tensor]] = {}
        n_pos = ids.shape[1]
        drawn = torch.stack([_drawn(collector.seed, number, n_pos) for number in numbers])
        windows = min(1.0, collector.sample * n_pos / min(TOGETHER, n_pos))  # share of them
        taken = drawn[:, :1] < windows
        drawn[:, 0] = 1.0  # position 0 is never chosen
        self.drawn = (taken & (drawn < collector.sample / windows)).to(ids.device)
        # The smallest draws of each window are its lens tokens: also independent of the batching.
        self.scored = torch.ones_like(ids, dtype=torch.bool) if scored is None else scored
        drawn = drawn.to(ids.device).where(self.scored, 2.0)
        self.lens_at = drawn.argsort(1)[:, :LENS_TOKENS]
        self.lens_kept = self.scored.gather(1, self.lens_at).flatten()

    def met(self, pair: SitePair) -> None:
        """One site of one student."""
        if pair.site in ("resid_pre", "resid_mid"):
            stream = (pair.site, pair.teacher, pair.value)
            self.streams[pair.student, pair.mode] = stream
        if pair.site == "resid_pre" and not self._of_front(pair):
            return  # the same numbers as resid_post of the block before
        scope = FLOOR if pair.student == FLOOR else MAIN
        if pair.site == "final":
            finals = self.finals.setdefault(scope, {TEACHER: pair.teacher})
            finals[pair.student] = pair.value
        layer = NO_LAYER if pair.layer is None else pair.layer
        if pair.site == "resid_post" and pair.mode == "free" and scope == MAIN:
            kept = self.lens.setdefault(layer, {TEACHER: self._lens_rows(pair.teacher)})
            kept[pair.student] = self._lens_rows(pair.value)
        address = Address(scope, pair.student, pair.mode, layer, pair.site)
        self.collector.meter(address, pair.value.shape[-1]).update(self._pair(pair, address))

    def _of_front(self, pair: SitePair) -> bool:
        """Whether a stream comes from an embedding that is not the teacher's own."""
        plan = self.collector.plans.get(pair.student)
        return pair.layer == 0 and pair.mode == "free" and plan is not None and plan.front

    def _pair(self, pair: SitePair, address: Address) -> Pair:
        """Teacher beside student; what depends on the teacher alone is worked out once for all students."""
        site, *stream = self.streams.get((pair.student, pair.mode), (None,))
        added = site is not None and site == before(self.teacher, pair.site)
        own = address.of_teacher()
        if own not in self.pairs:
            # Kept with the teacher on both sides: a kept student would live until the end of the batch.
            entering = (stream[0], stream[0]) if added else None
            self.pairs[own] = self._teacher_pair(
                pair.teacher, entering, self._counts(address.scope)
            )
            self.collector.teacher_meter(own, pair.value.shape[-1]).update(self.pairs[own])
        return self.pairs[own].with_student(pair.value, stream[1] if added else None)

    def _counts(self, scope: str) -> Tensor:
        """bool `batch pos`, the tokens that count. The floor is of a few tokens, and counts all of them."""
        return torch.ones_like(self.scored) if scope == FLOOR else self.scored

    def _teacher_pair(
        self, teacher: Tensor, entering: tuple[Tensor, Tensor] | None, counts: Tensor
    ) -> Pair:
        rows, pos, _ = teacher.shape
        valid = counts[:rows, :pos].to(teacher.device)
        bulk = valid & ~massive(teacher, torch.ones_like(valid))
        bulk[:, 0] = False
        sample = bulk & self.drawn[:rows, :pos].to(teacher.device)
        docs = self.docs[:rows].to(teacher.device)
        return Pair(teacher, teacher, docs, valid, bulk, sample, entering)

    def _lens_rows(self, stream: Tensor) -> Tensor:
        at = self.lens_at.to(stream.device)
        rows = stream.gather(1, at[..., None].expand(-1, -1, stream.shape[-1])).flatten(0, 1)
        return rows[self.lens_kept.to(stream.device)]

    def finish(self) -> None:
        """The logits of every student, then the lens, then nothing of this batch is left."""
        self.pairs.clear()
        self.streams.clear()
        with torch.no_grad():
            if self.collector.names(TEACHER, NO_LAYER, "logits"):
                for scope, finals in self.finals.items():
                    self._logits(scope, finals)
            if self.collector.names(TEACHER, NO_LAYER, "lens"):
                self._lens()

    def _logits(self, scope: str, finals: Mapping[str, Tensor]) -> None:
        rows, pos, _ = finals[TEACHER].shape
        # Of the whole windows: the last token has no next one, unless the window was cropped.
        every = torch.arange(self.ids.numel(), device=self.ids.device).view(self.ids.shape)
        counts = self._counts(scope)[:rows, :pos]
        predictions = Predictions.of(self.ids, self.docs, every[:rows, :pos][counts])
        flat = {name: final[counts.to(final.device)] for name, final in finals.items()}
        for name, pair in self._compare(flat, predictions):
            self.collector.meter(Address(scope, name, "free", NO_LAYER, "logits")).update(pair)

    def _lens(self) -> None:
        """Several layers at a time: a few rows a layer would leave the head's large matrix idle."""
        docs = self.docs[:, None].expand_as(self.lens_at).flatten()[self.lens_kept]
        positions = self.lens_at.flatten()[self.lens_kept]
        if not len(docs):
            return
        together = max(1, chunk_of(self.teacher) // len(docs))
        alike: dict[tuple[str, ...], list[int]] = {}  # layers that the same students reached
        for layer, kept in sorted(self.lens.items()):
            alike.setdefault(tuple(kept), []).append(layer)
        for names, layers in alike.items():
            for start in range(0, len(layers), together):
                some = layers[start : start + together]
                states = {
                    name: self._layout(name).final_norm(
                        torch.cat([self.lens[at][name].to(docs.device) for at in some])
                    )
                    for name in names
                }
                facts = (torch.full_like(docs, -1), docs, positions)
                predictions = Predictions(*(fact.repeat(len(some)) for fact in facts))
                for name, pair in self._compare(states, predictions, len(predictions.docs)):
                    for layer, part in zip(some, pair.split(len(docs)), strict=True):
                        self.collector.meter(Address(MAIN, name, "free", layer, "lens")).update(
                            part
                        )

    def _compare(
        self, states: Mapping[str, Tensor], predictions: Predictions, chunk: int | None = None
    ) -> Iterator[tuple[str, LogitPair]]:
        """Every student beside the teacher, from final states by name, `tokens d_model`."""
        students = [
            (name, self._layout(name), state) for name, state in states.items() if name != TEACHER
        ]
        return compare(self.teacher, states[TEACHER], students, predictions, chunk=chunk)

    def _layout(self, name: str) -> Layout:
        """Of a student; the teacher's own for itself; the run's teacher is the student of the floor."""
        if name == TEACHER:
            return self.teacher
        return self.collector.teacher if name == FLOOR else self.collector.students[name]


def _drawn(seed: int, number: int, n_pos: int) -> Tensor:
    """One uniform number per position of a window; that of position 0 is the window's own."""
    return torch.rand(n_pos, generator=torch.Generator().manual_seed(1_000_003 * seed + number))
