"""One batch: from meetings of teacher and student to pairs, from final states to logits. Lives for one batch only.

Masks. `valid`: every token, for windows are full. `bulk`: without position 0 and without massive tokens of the teacher
at that site, for they would rule every second moment. `sample`: a seeded part of bulk, so that second moments cost the
same whatever the length of the run.

Logits are never kept: the final states go through the head in chunks of tokens, the teacher's chunk once for all
students; a few tokens of each window go through it at every layer (logit lens, with the model's own final norm).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mismatch.address import NO_LAYER, TEACHER, Address
from mismatch.layout import Layout
from mismatch.metrics.base import LogitPair, Pair
from mismatch.tracing.sites import before, massive
from mismatch.tracing.stream import Meeting

if TYPE_CHECKING:
    from mismatch.collect import Collector

CHUNK = 256  # tokens that go through the head at once
LENS_TOKENS = 8  # tokens of each window that go through the head at every layer


class Batch:
    """Everything that lives for one batch."""

    def __init__(
        self,
        collector: Collector,
        ids: Tensor,
        docs: Tensor,
        numbers: Sequence[int],
        scope: str,
        teacher: Layout,
        students: Mapping[str, Layout],
    ) -> None:
        self.collector, self.ids, self.docs, self.scope = collector, ids, docs, scope
        self.teacher, self.students = teacher, students
        self.pairs: dict[tuple[int | None, str], Pair] = {}
        self.streams: dict[tuple[str, str], tuple[str, Tensor, Tensor]] = {}
        self.finals: dict[str, Tensor] = {}
        self.final: Tensor | None = None
        self.lens: dict[int, dict[str, Tensor]] = {}
        self.valid = torch.ones_like(ids, dtype=torch.bool)
        drawn = [_drawn(collector.seed, number, ids.shape[1]) for number in numbers]
        self.drawn = torch.stack(drawn).to(ids.device) < collector.sample
        # The smallest draws of each window are its lens tokens: also independent of the batching.
        self.lens_at = torch.stack([d.argsort()[:LENS_TOKENS] for d in drawn]).to(ids.device)

    def met(self, meeting: Meeting) -> None:
        """One site of one student."""
        key = (meeting.student, meeting.mode)
        if meeting.site in ("resid_pre", "resid_mid"):
            self.streams[key] = (meeting.site, meeting.teacher, meeting.value)
        if meeting.site == "resid_pre":
            return  # the same numbers as resid_post of the block before
        rows = len(meeting.value)
        if meeting.site == "final":
            self.finals[meeting.student], self.final = meeting.value, meeting.teacher
        elif meeting.site == "resid_post" and meeting.mode == "free":
            kept = self.lens.setdefault(meeting.layer, {})
            kept[TEACHER] = self._lens_rows(meeting.teacher)
            kept[meeting.student] = self._lens_rows(meeting.value)
        layer = NO_LAYER if meeting.layer is None else meeting.layer
        address = Address(self.scope, meeting.student, meeting.mode, layer, meeting.site)
        pair = self._pair(meeting, rows, address)
        self.collector.meter(address, meeting.value.shape[-1]).update(pair)

    def _pair(self, meeting: Meeting, rows: int, address: Address) -> Pair:
        place = (meeting.layer, meeting.site)
        wanted = before(self.teacher, meeting.site)
        given = self.streams.get((meeting.student, meeting.mode))
        stream = (
            given[1:] if wanted is not None and given is not None and given[0] == wanted else None
        )
        if place in self.pairs:
            return self.pairs[place].with_student(
                meeting.value, None if stream is None else stream[1]
            )
        valid = self.valid[:rows].to(meeting.value.device)
        bulk = valid & ~massive(meeting.teacher, valid)
        bulk[:, 0] = False
        sample = bulk & self.drawn[:rows].to(bulk.device)
        docs = self.docs[:rows].to(bulk.device)
        pair = Pair(meeting.teacher, meeting.value, docs, valid, bulk, sample, stream)
        self.pairs[place] = pair
        self.collector.teacher_meter(address.of_teacher(), meeting.value.shape[-1]).update(pair)
        return pair

    def _lens_rows(self, stream: Tensor) -> Tensor:
        at = self.lens_at[: len(stream)].to(stream.device)
        return stream.gather(1, at[..., None].expand(-1, -1, stream.shape[-1]))

    def finish(self) -> None:
        """The logits of every student, then the lens, then nothing of this batch is left."""
        self.pairs.clear()
        self.streams.clear()
        with torch.no_grad():
            if self.finals:
                self._logits()
            for layer, kept in self.lens.items():
                self._lens(layer, kept)

    def _logits(self) -> None:
        rows = len(self.final)
        ids = self.ids[:rows]
        targets = torch.full_like(ids, -1)
        targets[:, :-1] = ids[:, 1:]
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        docs = self.docs[:rows, None].expand_as(ids)
        self._through_the_head(
            {TEACHER: self.final, **self.finals}, targets, docs, positions, NO_LAYER, "logits"
        )

    def _lens(self, layer: int, kept: dict[str, Tensor]) -> None:
        rows = len(kept[TEACHER])
        at = self.lens_at[:rows]
        states = {
            name: (self.teacher if name == TEACHER else self.students[name]).final_norm(stream)
            for name, stream in kept.items()
        }
        docs = self.docs[:rows, None].expand_as(at)
        self._through_the_head(states, torch.full_like(at, -1), docs, at, layer, "lens")

    def _through_the_head(
        self,
        states: Mapping[str, Tensor],
        targets: Tensor,
        docs: Tensor,
        positions: Tensor,
        layer: int,
        at: str,
    ) -> None:
        """Chunk by chunk: final states, `batch pos d_model`, to log-probabilities, to every metric `at`."""
        if not self.collector.names(TEACHER, layer, at):
            return
        flat = {name: state.flatten(0, 1) for name, state in states.items()}
        target, doc, position = targets.flatten(), docs.flatten(), positions.flatten()
        for start in range(0, len(target), CHUNK):
            part = slice(start, start + CHUNK)
            teacher = _log_probs(self.teacher, flat[TEACHER][part])
            here = teacher.device
            pair: LogitPair | None = None
            for name, state in flat.items():
                if name == TEACHER:
                    continue
                student = _log_probs(self.students[name], state[part]).to(here)
                pair = (
                    LogitPair(
                        teacher,
                        student,
                        target[part].to(here),
                        doc[part].to(here),
                        position[part].to(here),
                    )
                    if pair is None
                    else pair.with_student(student)
                )
                address = Address(self.scope, name, "free", layer, at)
                self.collector.meter(address).update(pair)


def _log_probs(layout: Layout, final: Tensor) -> Tensor:
    return layout.head(final).float().log_softmax(-1)


def _drawn(seed: int, number: int, n_pos: int) -> Tensor:
    """One uniform number per position of a window; position 0 draws 1, so it is never chosen."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + number)
    drawn = torch.rand(n_pos, generator=generator)
    drawn[0] = 1.0
    return drawn
