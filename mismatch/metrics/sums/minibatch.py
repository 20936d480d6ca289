"""HSIC summed over groups of tokens of one window: `TeacherGroups`, `PairGroups`; for wide layers.

A group of m tokens costs m^2 d instead of the m d^2 of the moments, and its memory is O(1): three
sums per bucket of documents (those with the same number modulo `MOST`; of few long documents, of
windows: `Units`), which are what the interval is over.

Groups never cross windows, so they are the same however windows are batched, resumed or split among
processes: the sampled tokens of a window are dealt out to equal groups of at least `GROUP`, or form
one smaller group; the remainder, fewer tokens than there are groups, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mismatch.errors import RunError
from mismatch.metrics.sums.pairs import Pair, TeacherSide
from mismatch.metrics.sums.per_document import MOST, Estimate, estimate
from mismatch.runs.intervals import DOCUMENTS

GROUP = 256
SMALLEST_GROUP = 4  # HSIC_u is not defined below


class TeacherGroups:
    """Sum of HSIC_u(teacher, teacher) per bucket, at one site."""

    def __init__(self, group: int = GROUP) -> None:
        self.group = group
        self.own = np.zeros(MOST)

    def update(self, side: TeacherSide) -> None:
        """Adds the sampled tokens of one batch; call once per batch, not once per student."""
        for one in groups_of(side, self.group):
            self.own[one.bucket] += one.own

    def merge(self, other: TeacherGroups) -> TeacherGroups:
        self.own += other.own
        return self

    def state(self) -> dict[str, np.ndarray]:
        return {"own": self.own.copy()}

    def load(self, state: dict[str, np.ndarray]) -> TeacherGroups:
        self.own = _fit(state["own"], self.own.shape)
        return self


class PairGroups:
    """Sums of HSIC_u(teacher, student) and HSIC_u(student, student) per bucket, and the tokens; `units`: of what."""

    def __init__(self, group: int = GROUP, units: str = DOCUMENTS) -> None:
        self.group, self.units = group, units
        self.sums = np.zeros((2, MOST))
        self.tokens = np.zeros(MOST, np.int64)
        self.equal = True

    def update(self, pair: Pair) -> None:
        """Adds the sampled tokens of one batch."""
        self.equal &= pair.same_rows
        for one in groups_of(pair.side, self.group):
            both = student = one.own
            if not pair.same_rows:
                theirs = centred_kernel(pair.rows[one.index])
                both, student = hsic(one.kernel, theirs), hsic(theirs, theirs)
            self.sums[:, one.bucket] += both, student
            self.tokens[one.bucket] += len(one.index)

    def merge(self, other: PairGroups) -> PairGroups:
        self.sums += other.sums
        self.tokens += other.tokens
        self.equal &= other.equal
        return self

    def state(self) -> dict[str, np.ndarray]:
        return {
            "sums": self.sums.copy(),
            "tokens": self.tokens.copy(),
            "equal": np.array(self.equal),
        }

    def load(self, state: dict[str, np.ndarray]) -> PairGroups:
        self.sums = _fit(state["sums"], self.sums.shape)
        self.tokens = _fit(state["tokens"], self.tokens.shape)
        self.equal = bool(state["equal"])
        return self


class Groups:
    """What a minibatch metric reads: teacher and one student of one site."""

    def __init__(self, teacher: TeacherGroups, pair: PairGroups) -> None:
        self.teacher, self.pair = teacher, pair
        self.n = int(pair.tokens.sum())
        self.equal = pair.equal and self.n > 0

    def cka(self) -> Estimate:
        """sum HSIC_u(x, y) / sqrt(sum HSIC_u(x, x) sum HSIC_u(y, y)), with its interval."""
        used = self.pair.tokens > 0
        xy, xx, yy = (
            part[used] for part in (self.pair.sums[0], self.teacher.own, self.pair.sums[1])
        )
        found = estimate(
            lambda total: _cka(total(xy), total(xx), total(yy)),
            self.pair.tokens[used],
            self.pair.units,
        )
        if not self.equal:
            return found
        end = 1.0 if found.over else math.nan  # bit-equal sides are 1, not 1 within rounding
        return found._replace(value=1.0, lo=end, hi=end)


@dataclass(frozen=True)
class Group:
    """Tokens of one window, as all students share them.

    Attributes:
        bucket: of the window's document.
        index: int64 `tokens`, rows of `TeacherSide.rows`.
        kernel: `tokens tokens`, of the teacher.
        own: HSIC_u of the teacher with itself.
    """

    bucket: int
    index: Tensor
    kernel: Tensor
    own: float


def groups_of(side: TeacherSide, size: int) -> list[Group]:
    """The groups of one batch, window by window."""
    key = f"groups {size}"
    if key not in side.cache:
        side.cache[key] = []
        window = side.halves[0].to(side.rows.device) // side.teacher.shape[1]
        for number, doc in enumerate(side.docs.tolist()):
            tokens = (window == number).nonzero().squeeze(1)
            count = max(1, len(tokens) // size)
            even = tokens[: len(tokens) // count * count]
            if len(even) < SMALLEST_GROUP * count:
                continue
            for index in even.view(-1, count).T:
                kernel = centred_kernel(side.rows[index])
                one = Group(doc % MOST, index, kernel, hsic(kernel, kernel))
                side.cache[key].append(one)
    return side.cache[key]


def centred_kernel(x: Tensor) -> Tensor:
    """`tokens tokens`: the linear kernel of `tokens d`, centred first."""
    x = x - x.mean(0, keepdim=True)
    return x @ x.T


def hsic(k: Tensor, l: Tensor) -> float:  # noqa: E741
    """HSIC_u (Song et al. 2012, eq. 5) of kernels of centred data, `tokens tokens`, at least 4 tokens.

    For those it is [sum_ij K L - n/(n-2) sum_i K_ii L_ii + tr K tr L / ((n-1)(n-2))] / (n(n-3)).
    """
    n = len(k)
    a, b = k.diagonal().double(), l.diagonal().double()
    whole = (k * l).sum(dtype=torch.float64)
    inner = whole - n / (n - 2) * (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2))
    return float(inner / (n * (n - 3)))


def _cka(xy: np.ndarray, xx: np.ndarray, yy: np.ndarray) -> np.ndarray:
    """CKA of summed HSIC; nan where a denominator is not positive."""
    ok = (xx > 0) & (yy > 0)
    return np.where(ok, xy / np.sqrt(np.where(ok, xx * yy, 1.0)), np.nan)


def _fit(saved: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if saved.shape != shape:
        raise RunError(
            f"saved group sums have shape {saved.shape}, {shape} is due",
            hint="resume with the version of mismatch that began the run.",
        )
    return np.array(saved)
