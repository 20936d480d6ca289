"""What is left of the damage: KL of the student to the teacher on held-out text, with its interval over documents.

The teacher's stream entering the first swapped block and its final states are kept (2 d_model numbers a token), so that
judging a student costs its own blocks from there on and the head, never the teacher's blocks again. Logits are never
kept. Judged text is of another source than the training text, and what stops a rung is other windows than what is
reported.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mismatch.forward import hooks
from mismatch.forward.head import log_probs
from mismatch.forward.sites import taps
from mismatch.metrics.sums.logits import LogitPair
from mismatch.metrics.sums.per_document import PerDocument
from mismatch.models.layout import Layout
from mismatch.texts.windows import Windows

CHUNK = 256  # tokens that go through the head at once


@dataclass(frozen=True)
class Evaluated:
    """One student on one text.

    Attributes:
        kl: KL(teacher || student) of every token, in nats.
        nll: NLL(student) - NLL(teacher) of every token that has a next one, in nats.
    """

    kl: PerDocument
    nll: PerDocument


class HeldOut:
    """Holds the teacher's side of a text.

    Args:
        teacher: layout of the untouched model.
        cut: held-out windows.
        first: the first swapped layer.
        batch_size: windows per forward.
    """

    def __init__(self, teacher: Layout, cut: Windows, first: int, batch_size: int = 4) -> None:
        self.teacher, self.cut, self.first = teacher, cut, first
        device = teacher.embedding_device
        self.batches = [
            (torch.from_numpy(batch.ids).to(device), torch.from_numpy(batch.doc))
            for batch in cut.batches(batch_size)
        ]
        self._sides = [self._teacher_side(ids) for ids, _ in self.batches]

    @torch.no_grad()
    def _teacher_side(self, ids: Tensor) -> tuple[Tensor | None, Tensor]:
        kept: dict[str, Tensor] = {}
        wanted = [] if self.first == 0 else taps(self.teacher, self.first - 1)[-1:]
        final = hooks.run(
            self.teacher, ids, wanted, lambda _tap, value: kept.__setitem__("stream", value)
        )
        return kept.get("stream"), final

    @torch.no_grad()
    def evaluate(self, student: Layout) -> Evaluated:
        """KL and NLL difference of a student, by document."""
        n = self.cut.n_docs
        sums, counts = np.zeros((2, n)), np.zeros((2, n))
        for (ids, docs), (stream, final) in zip(self.batches, self._sides, strict=True):
            theirs = hooks.run(student, ids, (), lambda *_: None, start=self.first, stream=stream)
            targets = torch.full_like(ids, -1)
            targets[:, :-1] = ids[:, 1:]
            rows = docs[:, None].expand_as(ids).flatten().numpy()
            flat = (final.flatten(0, 1), theirs.flatten(0, 1), targets.flatten())
            for start in range(0, len(rows), CHUNK):
                at = slice(start, start + CHUNK)
                t, s, target = (x[at] for x in flat)
                pair = LogitPair(
                    log_probs(self.teacher, t),
                    log_probs(student, s),
                    target,
                    target,
                    target,
                )
                has = (target >= 0).cpu().numpy()
                before, after = (x.double().cpu().numpy() for x in pair.nll)
                doc = rows[at]
                sums[0] += np.bincount(doc, pair.kl.double().cpu().numpy(), n)
                counts[0] += np.bincount(doc, minlength=n)
                sums[1] += np.bincount(doc[has], (after - before)[has], n)
                counts[1] += np.bincount(doc[has], minlength=n)
        return Evaluated(PerDocument(sums[0], counts[0]), PerDocument(sums[1], counts[1]))
