"""How far students are from the teacher on held-out text: KL and NLL difference, with intervals.

The teacher runs once. Of each batch its stream entering the first swapped block and its final states are kept
(2 d_model numbers a token), so that a student costs its own blocks from there on and the head. Where a share of the
tokens is scored, it is drawn once and is the same for every student. Logits are never kept. Several ranks share the
batches, or where there are many students, these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mismatch.forward.head import Predictions, compare
from mismatch.forward.hooks import on_device
from mismatch.forward.shared_prefix import Stored, run_prefix, run_suffix
from mismatch.metrics.sums.meter import StudentMeter
from mismatch.metrics.sums.per_document import PerDocument, Units
from mismatch.models.layout import Layout
from mismatch.runs.ranks import ALONE, Ranks
from mismatch.texts.windows import Windows


@dataclass(frozen=True)
class Batch:
    """The teacher's side of one batch.

    Attributes:
        number: of the batch.
        ids: int64 `batch pos`.
        at: int64, which of the flattened tokens are scored; None: all.
        predictions: of those.
        reference: `scored d_model`, the teacher's final states of those.
        streams: the streams that students begin from.
    """

    number: int
    ids: Tensor
    at: Tensor | None
    predictions: Predictions
    reference: Tensor
    streams: Stored[int]

    def scored(self, final: Tensor) -> Tensor:
        """The scored tokens of final states, `batch pos d_model`: `scored d_model`."""
        return _rows(final, self.at)


@dataclass(frozen=True)
class Trial:
    """A student, and what is changed in it while it runs on a batch."""

    name: str
    layout: Layout
    during: Callable[[Batch], AbstractContextManager] = lambda _batch: nullcontext()


@dataclass(frozen=True)
class Evaluated:
    """One student on one text.

    Attributes:
        kl: KL(teacher || student) of every scored token, in nats.
        nll: NLL(student) - NLL(teacher) of every scored token that has a next one, in nats.
    """

    kl: PerDocument
    nll: PerDocument


class HeldOut:
    """A text with the teacher's side of it.

    Args:
        teacher: layout of the untouched model.
        windows: of evaluation or validation text; where only some of their tokens count, no other is scored.
        first: the first swapped layer.
        batch_size: windows per forward.
        scored: share of the tokens whose predictions are compared.
        seed: random seed of that share.
        progress: called after each run of a model over a batch.
        ranks: who shares the batches: each rank holds its own, and all of them evaluate the same students.
    """

    def __init__(
        self,
        teacher: Layout,
        windows: Windows,
        first: int,
        batch_size: int = 4,
        *,
        scored: float = 1.0,
        seed: int = 0,
        progress: Callable[[], None] = lambda: None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.teacher, self.windows, self.first = teacher, windows, first
        self.progress, self.ranks = progress, ranks
        self.units = Units.by(windows.doc, windows.offset)
        self.batches: list[Batch] = []
        generator = torch.Generator().manual_seed(seed)
        for number, part in enumerate(windows.batches(batch_size)):
            start = number * batch_size
            ids = on_device(teacher, part.ids)
            docs = on_device(teacher, self.units.of[start : start + len(part.ids)])
            at = _drawn(ids, torch.from_numpy(part.scored), scored, generator)
            if not ranks.mine(number):
                continue
            with torch.no_grad():
                final, streams = self.run_teacher(ids)
            predictions = Predictions.of(ids, docs, at)
            self.batches.append(Batch(number, ids, at, predictions, _rows(final, at), streams))
            progress()

    def run_teacher(self, ids: Tensor) -> tuple[Tensor, Stored[int]]:
        """The teacher's final states, `batch pos d_model`, and the stream entering the first swapped block."""
        return run_prefix(self.teacher, ids, [self.first])

    def evaluate(self, student: Layout) -> Evaluated:
        """KL and NLL difference of one student.

        Raises:
            RunError: it changed the teacher's stream in place.
        """
        return self.evaluate_all([Trial("student", student)])["student"]

    @torch.no_grad()
    def evaluate_all(self, trials: Sequence[Trial], ranks: Ranks = ALONE) -> dict[str, Evaluated]:
        """Each trial by its name; all are compared with the same chunk of the teacher's predictions.

        Args:
            trials: the same on every rank.
            ranks: who shares the trials, where each rank holds all batches: each evaluates its share, and gets all.

        Raises:
            RunError: a student changed the teacher's stream in place.
        """
        mine = [trial for at, trial in enumerate(trials) if ranks.mine(at)]
        found = {trial.name: self._meter() for trial in mine}
        assert len(found) == len(mine)  # each has sums of its own
        for batch in self.batches:
            states = [(t.name, t.layout, self._final(t, batch)) for t in mine]
            pairs = compare(self.teacher, batch.reference, states, batch.predictions)
            for name, pair in pairs:
                found[name].update(pair)
        found = {name: self._of_all_batches(meter) for name, meter in found.items()}
        parts = ranks.everywhere({name: _evaluated(meter) for name, meter in found.items()})
        every = {name: one for part in parts for name, one in part.items()}
        return {trial.name: every[trial.name] for trial in trials}

    def _meter(self) -> StudentMeter:
        return StudentMeter(
            ("kl", "nll"),
            n_docs=self.units.count,
            n_pos=self.windows.seq_len,
            units=self.units.over,
        )

    def _of_all_batches(self, meter: StudentMeter) -> StudentMeter:
        """The sums over the batches of all ranks, on every rank."""
        first, *others = self.ranks.everywhere(meter.state())
        whole = self._meter().load(first)
        for other in others:
            whole.merge(self._meter().load(other))
        return whole

    def _final(self, trial: Trial, batch: Batch) -> Tensor:
        with trial.during(batch):
            final = run_suffix(
                trial.layout, batch.ids, self.first, batch.streams, f"the {trial.name}"
            )
        self.progress()
        return batch.scored(final)


def _drawn(ids: Tensor, counts: Tensor, share: float, generator: torch.Generator) -> Tensor | None:
    """A seeded share of the flattened tokens that count (bool `batch pos`); None: all tokens."""
    whole = bool(counts.all())
    if share >= 1:
        return None if whole else counts.flatten().nonzero()[:, 0].to(ids.device)
    drawn = torch.rand(ids.shape, generator=generator) < share
    if whole:
        drawn[:, -2] = True  # no window without a scored token
    drawn &= counts
    drawn |= counts & ~drawn.any(1, keepdim=True)  # a window of few answers is scored whole
    return drawn.flatten().nonzero()[:, 0].to(ids.device)


def _rows(final: Tensor, at: Tensor | None) -> Tensor:
    flat = final.flatten(0, 1)
    return flat if at is None else flat[at.to(flat.device)]


def _evaluated(meter: StudentMeter) -> Evaluated:
    kl, nll = (meter.parts[name] for name in ("kl", "nll"))
    # The difference of sums in float64: the metric's own `shift` is rounded to float32 per token.
    return Evaluated(
        kl.per_document("kl"), nll.per_document("student") - nll.per_document("teacher")
    )
