"""KL on held-out text of many corrected students, through one teacher.

The teacher runs once. Of each batch its final states, the stream entering the first swapped block and what it adds at
the places are kept; a student then costs its own blocks from there on. A seeded part of the tokens goes through the
head, the same for everybody, the teacher's chunk once for all. Logits are never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mismatch.forward import hooks
from mismatch.forward.head import log_probs
from mismatch.forward.heldout import CHUNK, Evaluated
from mismatch.forward.sites import Tap, taps
from mismatch.metrics.sums.logits import LogitPair
from mismatch.metrics.sums.per_document import PerDocument
from mismatch.models.layout import Layout
from mismatch.stages.diagnose.forced import Side, teacher_sides
from mismatch.stages.diagnose.places import Place
from mismatch.texts.windows import Windows


@dataclass(frozen=True)
class Batch:
    """The teacher's side of one batch.

    Attributes:
        ids: int64 `batch pos`.
        at: int64, which of the flattened tokens are scored.
        docs: int64, the document of each of those.
        targets: int64, the token that follows each of those, -1 where there is none.
        final: `scored d`, the teacher's final states.
        sides: by place.
    """

    ids: Tensor
    at: Tensor
    docs: np.ndarray
    targets: Tensor
    final: Tensor
    sides: dict[Place, Side]


@dataclass(frozen=True)
class Trial:
    """A student, and what is corrected in it while it runs."""

    name: str
    layout: Layout
    during: Callable[[Batch], AbstractContextManager] = lambda _batch: nullcontext()


@dataclass(frozen=True)
class Behind:
    """How far the student's stream is from the teacher's, `||s - t|| / ||t||`, mean over tokens, by layer."""

    layers: tuple[int, ...]
    errors: tuple[float, ...]


class CorrectedHeldOut:
    """Holds the teacher's side of a text.

    Args:
        teacher: layout.
        places: the swapped places.
        cut: held-out windows.
        batch_size: windows per forward.
        scored: share of the tokens whose predictions are compared.
        seed: of which.
        student: whose stream behind the places is compared on the way.
        complete: adds to the sides what only others know.
    """

    def __init__(
        self,
        teacher: Layout,
        places: Sequence[Place],
        cut: Windows,
        *,
        batch_size: int,
        scored: float,
        seed: int,
        student: Layout,
        complete: Callable[[Tensor, dict[Place, Side]], None],
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.teacher, self.first, self.n_docs = teacher, places[0].layer, cut.n_docs
        self.last, self.progress = places[-1].layer, progress
        device = teacher.embedding_device
        generator = torch.Generator().manual_seed(seed)
        self.batches: list[Batch] = []
        sums, count = np.zeros(teacher.n_layers - self.last), 0
        with torch.no_grad():
            for part in cut.batches(batch_size):
                ids = torch.from_numpy(part.ids).to(device)
                drawn = torch.rand(ids.shape, generator=generator) < scored
                drawn[:, -2] = True  # no window without a scored token
                at = drawn.flatten().nonzero()[:, 0]
                sides, final, streams = teacher_sides(
                    teacher, places, ids, whole=True, behind=self.last
                )
                complete(ids, sides)
                targets = torch.full_like(ids, -1)
                targets[:, :-1] = ids[:, 1:]
                docs = torch.from_numpy(part.doc)[:, None].expand(ids.shape).flatten()
                flat = at.to(device)
                self.batches.append(
                    Batch(
                        ids,
                        flat,
                        docs[at].numpy(),
                        targets.flatten()[flat],
                        final.flatten(0, 1)[flat.to(final.device)],
                        sides,
                    )
                )
                sums += self._apart(student, ids, sides[places[0]].stream, streams)
                count += ids.numel()
                progress()
        layers = tuple(range(self.last, teacher.n_layers))
        self.behind = Behind(layers, tuple(float(v) for v in sums / count))

    def _apart(
        self, student: Layout, ids: Tensor, stream: Tensor, theirs: dict[int, Tensor]
    ) -> np.ndarray:
        sums = np.zeros(self.teacher.n_layers - self.last)

        def compare(tap: Tap, value: Tensor) -> None:
            t = theirs[tap.layer].to(value.device)
            error = (value - t).norm(dim=-1) / t.norm(dim=-1)
            sums[tap.layer - self.last] = float(error.double().sum())

        wanted = [
            taps(student, layer, inner=False)[-1] for layer in range(self.last, student.n_layers)
        ]
        hooks.run(student, ids, wanted, compare, start=self.first, stream=stream)
        return sums

    @torch.no_grad()
    def evaluate(self, trials: Sequence[Trial]) -> dict[str, Evaluated]:
        """KL and NLL difference of each, by document."""
        n = self.n_docs
        assert len({trial.name for trial in trials}) == len(trials)  # each has sums of its own
        found = {
            t.name: Evaluated(*(PerDocument(np.zeros(n), np.zeros(n)) for _ in range(2)))
            for t in trials
        }
        for batch in self.batches:
            states = {trial.name: self._final(trial, batch) for trial in trials}
            for start in range(0, len(batch.at), CHUNK):
                self._score(batch, slice(start, start + CHUNK), trials, states, found)
        return found

    def _final(self, trial: Trial, batch: Batch) -> Tensor:
        """The student's final states of the scored tokens."""
        stream = next(iter(batch.sides.values())).stream
        with trial.during(batch):
            final = hooks.run(
                trial.layout, batch.ids, (), lambda *_: None, start=self.first, stream=stream
            )
        self.progress()
        return final.flatten(0, 1)[batch.at.to(final.device)]

    def _score(
        self,
        batch: Batch,
        part: slice,
        trials: Sequence[Trial],
        states: dict[str, Tensor],
        found: dict[str, Evaluated],
    ) -> None:
        n, docs = self.n_docs, batch.docs[part]
        theirs = log_probs(self.teacher, batch.final[part])
        target = batch.targets[part].to(theirs.device)
        pair = None
        has = (target >= 0).cpu().numpy()
        for trial in trials:
            ours = log_probs(trial.layout, states[trial.name][part]).to(theirs.device)
            pair = (
                LogitPair(theirs, ours, target, target, target)
                if pair is None
                else pair.with_student(ours)
            )
            before, after = (x.double().cpu().numpy() for x in pair.nll)
            into = found[trial.name]
            into.kl.sums[:] += np.bincount(docs, pair.kl.double().cpu().numpy(), n)
            into.nll.sums[:] += np.bincount(docs[has], (after - before)[has], n)
            into.kl.counts[:] += np.bincount(docs, minlength=n)
            into.nll.counts[:] += np.bincount(docs[has], minlength=n)
