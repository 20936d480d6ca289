"""`TokenSums`: everything that is kept of a number per token. Sums, so parts merge in any order.

Kept per column (a metric may have several numbers per token): the sum per document (for the mean
and its interval; of few long documents per window), the sum per document and position bin where
asked for, the largest value, and where asked for a histogram with fixed edges for p5, p50, p95. The
edges are spaced by 2 % on a signed logarithmic axis from 1e-12 to 1e6, so a quantile is right to
1 %; smaller values count as 0. Memory: O(documents + edges), at most `MOST` documents: beyond that,
documents with the same number modulo `MOST` are one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mismatch.errors import RunError
from mismatch.metrics.sums.per_document import MOST, PerDocument
from mismatch.metrics.sums.readings import Reading
from mismatch.runs.intervals import DOCUMENTS

FIRST_BINS = (0, 1, 4, 16, 64)  # then doubling: 128, 256, ...
SMALLEST, LARGEST, STEP = 1e-12, 1e6, math.log(1.02)
SIDE = math.ceil(math.log(LARGEST / SMALLEST) / STEP)  # histogram bins on either side of 0


def bin_starts(n_pos: int) -> np.ndarray:
    """First position of each position bin: 0, 1, 4, 16, 64, 128, 256, ... below `n_pos`."""
    starts = list(FIRST_BINS)
    while starts[-1] * 2 < n_pos:
        starts.append(starts[-1] * 2)
    return np.array([start for start in starts if start < n_pos])


def bin_names(n_pos: int) -> list[str]:
    """Names of the bins, ends inclusive: "0", "1-3", "4-15", ..., the last one cut at n_pos - 1."""
    starts = bin_starts(n_pos)
    ends = [*(starts[1:] - 1), n_pos - 1]
    return [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class Kept:
    """The tokens that a mask keeps: flat index, and document and position of each, on the CPU."""

    index: Tensor
    docs: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, keep: Tensor, docs: Tensor, positions: Tensor) -> Kept:
        """From a bool mask; `docs` and `positions`, int64, broadcast to its shape."""
        index = keep.flatten().nonzero().squeeze(1)
        docs = docs.expand(keep.shape).flatten()[index]
        positions = positions.expand(keep.shape).flatten()[index]
        return cls(index, docs.cpu().numpy(), positions.cpu().numpy())

    def pick(self, values: Tensor) -> np.ndarray:
        """Float64: the kept numbers."""
        return values.flatten()[self.index].cpu().double().numpy()


class TokenSums:
    """Sums of one or more numbers per token.

    Args:
        n_docs: number of documents (or windows: `Units`) of the whole run, numbered 0..n_docs-1.
        n_pos: longest window; positions are 0..n_pos-1.
        columns: names of the numbers.
        by_position: keep sums per position bin too.
        histogram: columns whose quantiles will be asked for.
        units: what the sums are kept by.
        positive: whether the numbers cannot be negative.
    """

    def __init__(
        self,
        n_docs: int,
        n_pos: int,
        columns: tuple[str, ...] = ("value",),
        *,
        by_position: bool = False,
        histogram: tuple[str, ...] = (),
        units: str = DOCUMENTS,
        positive: bool = False,
    ) -> None:
        self.columns = columns
        self.units, self.positive = units, positive
        self.histogram = histogram
        self.n_pos = n_pos
        self.blocks = max(1, min(n_docs, MOST))
        self.starts = bin_starts(n_pos) if by_position else np.array([0])
        shape = (self.blocks, len(self.starts))
        self.counts = np.zeros(shape, np.int64)
        self.sums = np.zeros((len(columns), *shape))
        self.max = np.full(len(columns), -math.inf)
        self.hist = np.zeros((len(histogram), 2 * SIDE + 1), np.int64)

    def update(self, values: dict[str, Tensor], kept: Kept) -> None:
        """Adds the kept tokens of one batch.

        Args:
            values: column -> number per token, any type, of the shape of the mask behind `kept`.
                Values that are not kept may be anything, nan included.
            kept: which tokens count, and where they are.
        """
        if len(kept.positions) and kept.positions.max() >= self.n_pos:
            raise RunError(
                f"token position {kept.positions.max()} is outside of the table for positions 0 to "
                f"{self.n_pos - 1}",
                hint="n_pos must be the longest window of the run.",
            )
        cell = kept.docs % self.blocks * len(self.starts)
        if len(self.starts) > 1:
            cell += np.searchsorted(self.starts, kept.positions, side="right") - 1
        shape, size = self.counts.shape, self.counts.size
        self.counts += np.bincount(cell, minlength=size).reshape(shape)
        for i, column in enumerate(self.columns):
            number = kept.pick(values[column])
            self.sums[i] += np.bincount(cell, number, minlength=size).reshape(shape)
            if len(number):
                self.max[i] = np.maximum(self.max[i], number.max())
            if column in self.histogram:
                row = self.hist[self.histogram.index(column)]
                row += np.bincount(_bins(number), minlength=len(row))

    def merge(self, other: TokenSums) -> TokenSums:
        """Adds the tokens of `other`; the result equals one pass over both."""
        _same(
            self.counts.shape == other.counts.shape and self.columns == other.columns, "TokenSums"
        )
        self.counts += other.counts
        self.sums += other.sums
        self.max = np.maximum(self.max, other.max)
        self.hist += other.hist
        return self

    def state(self) -> dict[str, np.ndarray]:
        """Copies of the arrays; `load` of them gives the same object back, bit for bit."""
        return {name: getattr(self, name).copy() for name in ("counts", "sums", "max", "hist")}

    def load(self, state: dict[str, np.ndarray]) -> TokenSums:
        for name in ("counts", "sums", "max", "hist"):
            _same(state[name].shape == getattr(self, name).shape, f"saved TokenSums.{name}")
            setattr(self, name, np.array(state[name]))
        return self

    @property
    def n(self) -> int:
        """Tokens added so far."""
        return int(self.counts.sum())

    def per_document(self, column: str, at: int | None = None) -> PerDocument:
        """The sums of a column by document; with `at`, of one position bin alone."""
        sums = self.sums[self.columns.index(column)]
        whole = at is None
        sums, counts = (x.sum(1) if whole else x[:, at] for x in (sums, self.counts))
        return PerDocument(sums, counts, self.units, self.positive)

    def mean(self, column: str, stat: str = "mean") -> Reading:
        """Mean over all kept tokens, with its interval."""
        return Reading.of(stat, self.per_document(column).mean())

    def by_position(self, column: str, stat: str = "mean") -> list[Reading]:
        """Mean per position bin that holds tokens, each with its interval."""
        if len(self.starts) == 1:
            return []
        found = {
            name: self.per_document(column, at).mean()
            for at, name in enumerate(bin_names(self.n_pos))
        }
        return [Reading.of(stat, mean, name) for name, mean in found.items() if mean.n]

    def largest(self, column: str, stat: str = "max") -> Reading:
        """The largest kept number; no interval."""
        value = float(self.max[self.columns.index(column)]) if self.n else math.nan
        return Reading(stat, value, n=self.n)

    def quantile(self, column: str, q: float, stat: str) -> Reading:
        """Quantile `q` in 0..1 from the histogram: right to 1 %, no interval."""
        counts = self.hist[self.histogram.index(column)]
        total = int(counts.sum())
        if total == 0:
            return Reading(stat, math.nan)
        below = np.cumsum(counts)
        rank = q * (total - 1) + 0.5
        i = int(np.searchsorted(below, rank))
        inside = (rank - (below[i] - counts[i])) / counts[i]
        top = self.max[self.columns.index(column)]
        return Reading(stat, min(_value(i, inside), float(top)), n=total)


def _bins(number: np.ndarray) -> np.ndarray:
    """Histogram bin of each value: 0..SIDE-1 negative, SIDE zero, SIDE+1..2*SIDE positive."""
    size = np.clip(np.nan_to_num(np.abs(number), nan=LARGEST), SMALLEST / 2, LARGEST)
    step = np.clip(np.floor(np.log(size / SMALLEST) / STEP) + 1, 0, SIDE).astype(np.int64)
    return SIDE + np.where(number < 0, -step, step)


def _value(i: int, inside: float) -> float:
    """The value at the share `inside` of histogram bin `i`."""
    if i == SIDE:
        return 0.0
    if i > SIDE:
        return SMALLEST * math.exp((i - SIDE - 1 + inside) * STEP)
    return -SMALLEST * math.exp((SIDE - i - inside) * STEP)


def _same(ok: bool, what: str) -> None:
    if not ok:
        raise RunError(
            f"{what} do not fit: another set of documents, windows or metrics",
            hint="merge and resume only parts of one run, with the same settings.",
        )
