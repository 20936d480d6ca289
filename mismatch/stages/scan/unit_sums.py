"""What cells lost, unit by unit, in a size that plan.json can hold, and the draws of a bootstrap from it. No torch.

A ranking is made of damage on a few documents or prompts; with others it would be another one. So units are drawn
again, the same for all cells, for a document that is hard is hard for all of them. `n - 1` of `n` units are drawn
with replacement, for drawing `n` makes a few documents look too sure (Rao and Wu 1988, JASA 83:231, for one stratum):
the variance of the mean is then unbiased. Where windows of fewer documents are the units, what is drawn is blocks of
neighbours, as long as those of the intervals (`mismatch.metrics.sums.per_document`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mismatch.errors import RunError
from mismatch.metrics.sums.per_document import PerDocument, width
from mismatch.runs.intervals import BLOCKS

DRAWS = 200
"""Draws: a share of them is known to .07 at most."""
MOST = 64
"""Units that are kept of a task: of more, neighbours are added up."""
DIGITS = 7
"""Of each sum that is kept."""


@dataclass(frozen=True)
class UnitSums:
    """One task.

    Attributes:
        over: what the units are, as a table says it.
        counts: tokens behind each unit.
        sums: by the key of a cell (`infini@18`), what its right tokens lost in each unit, nats; of text the KL.
    """

    over: str
    counts: tuple[int, ...]
    sums: dict[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        units = len(self.counts)
        if not sum(self.counts) > 0 or any(len(row) != units for row in self.sums.values()):
            raise RunError(
                f"the plan does not fit: a cell needs a number for each of {units} units with tokens",
                hint="the file was changed by hand: scan again",
            )

    @classmethod
    def of(cls, parts: dict[str, PerDocument]) -> UnitSums:
        """What is kept of the sums of some cells on the same tokens."""
        first = next(iter(parts.values()))
        used = np.flatnonzero(first.counts)
        starts = np.arange(0, len(used), -(-len(used) // MOST))

        def pooled(numbers: np.ndarray) -> np.ndarray:
            return np.add.reduceat(numbers[used], starts)

        return cls(
            over=first.units,
            counts=tuple(map(int, pooled(first.counts))),
            sums={
                key: tuple(float(f"{x:.{DIGITS}g}") for x in pooled(part.sums))
                for key, part in parts.items()
            },
        )

    @property
    def enough(self) -> bool:
        """Whether there are units enough to draw from."""
        return width(np.array(self.counts), self.over) is not None

    def means(self, keys: Sequence[str]) -> np.ndarray:
        """Float64 `keys`: nats per token."""
        return self._matrix(keys).sum(1) / sum(self.counts)

    def drawn(self, keys: Sequence[str], seed: int, draws: int = DRAWS) -> np.ndarray:
        """Float64 `draws keys`: the same on units drawn again; the same units for all keys."""
        counts = np.array(self.counts, float)
        units, wide = len(counts), width(counts, self.over) or 1
        draw = np.random.default_rng([seed, units])
        if self.over == BLOCKS:
            starts = draw.integers(units - wide + 1, size=(draws, -(-units // wide)))
            at = (starts[:, :, None] + np.arange(wide)).reshape(draws, -1)
        else:
            at = draw.integers(units, size=(draws, max(units - 1, 1)))
        weights = np.stack([np.bincount(row, minlength=units) for row in at]).astype(float)
        found: np.ndarray = (weights @ self._matrix(keys).T) / (weights @ counts)[:, None]
        return found

    def _matrix(self, keys: Sequence[str]) -> np.ndarray:
        return np.array([self.sums[key] for key in keys], float).reshape(len(keys), -1)
