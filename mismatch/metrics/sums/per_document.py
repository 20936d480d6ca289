"""Sums over documents, and the one interval: every mean, ratio and interval comes from here.

The tokens of one document are not independent, so what is left out or drawn is whole documents. Where there are fewer
than `DOCUMENTS_NEEDED` of them but at least `WINDOWS_NEEDED` windows (one long text in a file), it is moving blocks of
consecutive windows, document after document; such an interval says how sure the number is on more of this very text,
and nothing of other texts. Below both there is none. `Units.of` decides it, and every estimate says it (`over`).

The interval is a jackknife with Student's t. A number made of sums is made again without each unit, or without each
block of b neighbours (Kuensch 1989, Annals of Statistics 17:1217, section 2.1); with m units or blocks of n units

    se^2 = n / (b m) sum_i (number without i - number)^2        b = 1: documents

and `number +- t se`. With b = 1 that is HC3, or CR3 (Bell and McCaffrey 2002): the jackknife without its factor
(n - 1) / n, which few documents need. Documents of unequal length count as fewer: degrees of freedom are
(sum c)^2 / sum c^2 - 1 with c the tokens of each (Kish 1965; Carter, Schnepel and Steigerwald 2017). Blocks have
b = sqrt(n) windows (Flegal and Jones 2010), a quarter of them at most, and 1.5 (n / b - 1) degrees, for they overlap
(Meketon and Schmeiser 1984). A number that cannot be negative is taken by its logarithm: no end is negative. How often
all that holds the true number is measured by `analyses/interval_coverage.py`; the percentile bootstraps of documents
and of moving blocks, whose variance this is, are too narrow for few.

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
from scipy.special import stdtrit

from mismatch.errors import RunError
from mismatch.runs.intervals import BLOCKS, DOCUMENTS, DOCUMENTS_NEEDED, WINDOWS_NEEDED

LEVEL = 0.95
MOST = 1024
"""Units that are kept; of more windows, neighbours are one unit, and of more documents, every so many."""

Total = Callable[[np.ndarray], Any]
"""Adds up numbers of units: one float, or many of them, each without a unit or a block."""


class Estimate(NamedTuple):
    """A number, its 95 % interval (nan where there is none), the tokens behind it, and what the interval is over.

    `over` is a word of `mismatch.runs.intervals`, "" without an interval.
    """

    value: float
    lo: float
    hi: float
    n: int
    over: str = ""


@dataclass(frozen=True)
class Units:
    """What sums are kept by.

    Attributes:
        of: int64 `windows`: the unit of each window, 0..count-1.
        over: `DOCUMENTS`, or `BLOCKS`: each window is a unit, document after document.
    """

    of: np.ndarray
    over: str

    @classmethod
    def by(cls, docs: np.ndarray, offset: np.ndarray | None = None) -> Units:
        """The units of windows.

        Args:
            docs: int `windows`, the document of each.
            offset: `windows`, the place of each in its document; None: those of a document stand in its order.
        """
        if len(set(docs.tolist())) >= DOCUMENTS_NEEDED or len(docs) < WINDOWS_NEEDED:
            return cls(docs, DOCUMENTS)
        place = np.empty(len(docs), np.int64)
        offset = np.arange(len(docs)) if offset is None else offset
        place[np.lexsort((offset, docs))] = np.arange(len(docs)) // -(-len(docs) // MOST)
        return cls(place, BLOCKS)

    @property
    def count(self) -> int:
        """How many units there are."""
        return int(self.of.max()) + 1 if len(self.of) else 0

    @property
    def enough(self) -> bool:
        """Whether they give an interval."""
        return _plan(np.bincount(self.of), self.over) is not None


@dataclass(frozen=True)
class PerDocument:
    """A number per token, added up per document (or per window, where there are too few documents: see above).

    Attributes:
        sums: float64 `units`.
        counts: `units`, the tokens behind each sum. A unit without tokens takes no part.
        units: what they are.
        positive: whether the number cannot be negative; a difference always can.
    """

    sums: np.ndarray
    counts: np.ndarray
    units: str = DOCUMENTS
    positive: bool = False

    @property
    def total(self) -> float:
        """The sum over all documents."""
        return float(self.sums.sum())

    @property
    def n(self) -> int:
        """The tokens behind it."""
        return int(self.counts.sum())

    def __add__(self, other: PerDocument) -> PerDocument:
        both = self.positive and other.positive
        return PerDocument(self.sums + other.sums, self._same_counts(other), self.units, both)

    def __sub__(self, other: PerDocument) -> PerDocument:
        return PerDocument(self.sums - other.sums, self._same_counts(other), self.units)

    def mean(self) -> Estimate:
        """Mean over all tokens; nan without tokens."""
        used = self.counts > 0
        sums, counts = self.sums[used], self.counts[used]
        return estimate(
            lambda total: total(sums) / total(counts), counts, self.units, self.positive
        )

    def over(self, other: PerDocument) -> Estimate:
        """The sum of this over the sum of another; nan unless that is positive."""
        used = self._same_counts(other) > 0
        ours, theirs = self.sums[used], other.sums[used]
        if not other.total > 0:
            return Estimate(math.nan, math.nan, math.nan, self.n)
        return estimate(
            lambda total: total(ours) / total(theirs),
            self.counts[used],
            self.units,
            self.positive and other.positive,
        )

    def gap_closed(self, swapped: PerDocument) -> Estimate:
        """(KL swapped - KL this) / KL swapped; nan where the swap did no damage."""
        left = self.over(swapped)
        return left._replace(value=1.0 - left.value, lo=1.0 - left.hi, hi=1.0 - left.lo)

    def _same_counts(self, other: PerDocument) -> np.ndarray:
        if not np.array_equal(self.counts, other.counts):
            raise RunError(
                "the tokens behind a paired difference do not fit: another set of documents or windows",
                hint="compare two students on the same tokens of one run.",
            )
        return self.counts


def estimate(
    statistic: Callable[[Total], Any],
    counts: np.ndarray,
    over: str = DOCUMENTS,
    positive: bool = False,
) -> Estimate:
    """A number made of sums over units, and its interval.

    Args:
        statistic: makes the number (or an array of them) with the `total` that it is given:
            `lambda total: total(sums) / total(counts)`.
        counts: `units`, the tokens behind each.
        over: what the units are.
        positive: whether the number cannot be negative.
    """
    n = int(counts.sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(np.sum)) if len(counts) else math.nan
        plan = _plan(counts, over)
        if plan is None or not math.isfinite(value):
            return Estimate(value, math.nan, math.nan, n)
        wide, degrees = plan
        without = np.asarray(statistic(lambda x: _without(x, wide)), float)
    if not np.isfinite(without).all():
        return Estimate(value, math.nan, math.nan, n)
    logarithm = positive and value > 0 and bool((without > 0).all())
    away = np.log(without / value) if logarithm else without - value
    units = len(counts)
    error = math.sqrt(units / (wide * len(away)) * float((away**2).sum()))
    reach = _quantile(degrees) * error
    if logarithm:
        times = math.exp(min(reach, 700.0))  # more is no number
        return Estimate(value, value / times, value * times, n, over)
    lo = value - reach
    return Estimate(value, max(lo, 0.0) if positive else lo, value + reach, n, over)


def width(counts: np.ndarray, over: str) -> int | None:
    """Neighbouring units that go together: 1 of documents; None where there are too few units for an interval."""
    plan = _plan(counts, over)
    return None if plan is None else plan[0]


def _plan(counts: np.ndarray, over: str) -> tuple[int, float] | None:
    """Units left out at a time, and degrees of freedom; None where there is too little for an interval."""
    units = int(np.count_nonzero(counts))
    if over == BLOCKS:
        if units < WINDOWS_NEEDED:
            return None
        wide = min(math.isqrt(units), units // DOCUMENTS_NEEDED)
        return wide, 1.5 * (units / wide - 1)
    if units < DOCUMENTS_NEEDED:
        return None
    counts = counts / counts.sum()
    return 1, max(1.0, 1.0 / float((counts**2).sum()) - 1)


def _without(x: np.ndarray, wide: int) -> np.ndarray:
    """The sum of `x` without each `wide` neighbours."""
    return np.sum(x) - np.lib.stride_tricks.sliding_window_view(x, wide).sum(-1)


@lru_cache(maxsize=1024)
def _quantile(degrees: float) -> float:
    """Of Student's t, for both ends of the interval."""
    return float(stdtrit(degrees, (1 + LEVEL) / 2))
