"""Sums over documents, and the one bootstrap over documents: every mean and every interval comes from here.

The unit of resampling is the document, because the tokens of one document are not independent. A mean over tokens is a
ratio of two sums over documents (of values, of counts), so a resample is one row of multinomial weights and all
resamples are one matrix product. Percentile interval (Efron and Tibshirani 1993, "An Introduction to the Bootstrap",
section 13.3). With few documents it is too narrow: simulated with normal and log-normal documents, a nominal 95 %
covers 88 % with 8 documents, 90-92 % with 16, 93-94 % with 40.

Two students on the same tokens are compared by the difference of their sums (`a - b`): a paired difference, far
narrower than the two single intervals suggest, because a hard document is hard for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from mismatch.errors import RunError

RESAMPLES = 1000
LEVEL = 0.95

Total = Callable[[np.ndarray], Any]
"""Adds numbers up over documents, `docs`: one float, or `RESAMPLES` of them, one for each resample."""


class Estimate(NamedTuple):
    """A number, its 95 % interval over documents (nan where there is none), and the tokens behind it."""

    value: float
    lo: float
    hi: float
    n: int


@dataclass(frozen=True)
class PerDocument:
    """A number per token, added up per document.

    Attributes:
        sums: float64 `docs`.
        counts: `docs`, the tokens behind each sum. A document without tokens takes no part.
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def total(self) -> float:
        """The sum over all documents."""
        return float(self.sums.sum())

    @property
    def n(self) -> int:
        """The tokens behind it."""
        return int(self.counts.sum())

    def __add__(self, other: PerDocument) -> PerDocument:
        return PerDocument(self.sums + other.sums, self._same_counts(other))

    def __sub__(self, other: PerDocument) -> PerDocument:
        return PerDocument(self.sums - other.sums, self._same_counts(other))

    def mean(self, seed: int = 0) -> Estimate:
        """Mean over all tokens; nan without tokens."""
        used = self.counts > 0
        sums, counts = self.sums[used], self.counts[used]
        if not len(sums):
            return Estimate(math.nan, math.nan, math.nan, 0)
        found = bootstrap(lambda total: total(sums) / total(counts), len(sums), seed)
        return Estimate(*found, self.n)

    def over(self, other: PerDocument, seed: int = 0) -> Estimate:
        """The sum of this over the sum of another; nan unless that is positive."""
        return self._against(other, lambda ratio: ratio, seed)

    def gap_closed(self, swapped: PerDocument, seed: int = 0) -> Estimate:
        """(KL swapped - KL this) / KL swapped; nan where the swap did no damage."""
        return self._against(swapped, lambda ratio: 1.0 - ratio, seed)

    def _against(self, other: PerDocument, change: Callable[[Any], Any], seed: int) -> Estimate:
        used = self._same_counts(other) > 0
        ours, theirs = self.sums[used], other.sums[used]
        if not other.total > 0:
            return Estimate(math.nan, math.nan, math.nan, self.n)
        found = bootstrap(lambda total: change(total(ours) / total(theirs)), len(ours), seed)
        return Estimate(*found, self.n)

    def _same_counts(self, other: PerDocument) -> np.ndarray:
        if not np.array_equal(self.counts, other.counts):
            raise RunError(
                "the tokens behind a paired difference do not fit: another set of documents or windows",
                hint="compare two students on the same tokens of one run.",
            )
        return self.counts


def bootstrap(
    statistic: Callable[[Total], Any], documents: int, seed: int = 0
) -> tuple[float, float, float]:
    """A number made of sums over documents, and its percentile interval.

    Args:
        statistic: makes the number (or an array of them, one for each resample) with the `total` that it is given:
            `lambda total: total(sums) / total(counts)`.
        documents: how many there are; with fewer than two there is no interval.
        seed: of the resampling. The same documents are drawn whatever the statistic.

    Returns:
        value, lo, hi.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(np.sum))
        if documents < 2:
            return value, math.nan, math.nan
        return value, *interval(statistic(resamples(documents, seed).__matmul__))


@lru_cache(maxsize=16)
def resamples(n: int, seed: int = 0) -> np.ndarray:
    """Float64 `RESAMPLES n`: how often each of `n` documents is drawn in each resample."""
    rng = np.random.Generator(np.random.PCG64(seed))
    weights = rng.multinomial(n, np.full(n, 1.0 / n), size=RESAMPLES).astype(np.float64)
    weights.setflags(write=False)
    return weights


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The percentile interval of `draws`; nan where fewer than half of them are finite numbers."""
    finite = draws[np.isfinite(draws)]
    if len(finite) * 2 < len(draws):
        return math.nan, math.nan
    lo, hi = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(lo), float(hi)
