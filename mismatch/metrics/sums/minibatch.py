"""HSIC summed over groups of random tokens: `TeacherGroups`, `PairGroups`; for wide layers.

A group of m tokens costs m^2 d instead of the m d^2 of the moments, and its memory is O(1): three
sums per bucket of batches. The buckets (batches with the same first document modulo `BUCKETS`)
are what the interval resamples.

Groups never cross batches: the sampled tokens of a batch are shuffled (seeded by the documents in
it, so a resumed or a split run makes the same groups) and cut into equal groups of about `GROUP`;
the remainder, fewer tokens than there are groups, is left out.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mismatch.errors import RunError
from mismatch.metrics.sums.pairs import Pair, TeacherSide
from mismatch.metrics.sums.per_document import bootstrap

GROUP = 256
BUCKETS = 512
SMALLEST_GROUP = 4  # HSIC_u is not defined below


class TeacherGroups:
    """Sum of HSIC_u(teacher, teacher) per bucket, at one site."""

    def __init__(self, group: int = GROUP, seed: int = 0) -> None:
        self.group, self.seed = group, seed
        self.own = np.zeros(BUCKETS)

    def update(self, side: TeacherSide) -> None:
        """Adds the sampled tokens of one batch; call once per batch, not once per student."""
        self.own[_bucket(side)] += float(batch_groups(side, self.group, self.seed)[2].sum())

    def merge(self, other: TeacherGroups) -> TeacherGroups:
        self.own += other.own
        return self

    def state(self) -> dict[str, np.ndarray]:
        return {"own": self.own.copy()}

    def load(self, state: dict[str, np.ndarray]) -> TeacherGroups:
        self.own = _fit(state["own"], self.own.shape)
        return self


class PairGroups:
    """Sums of HSIC_u(teacher, student) and HSIC_u(student, student) per bucket, and the tokens."""

    def __init__(self, group: int = GROUP, seed: int = 0) -> None:
        self.group, self.seed = group, seed
        self.sums = np.zeros((2, BUCKETS))
        self.tokens = np.zeros(BUCKETS, np.int64)
        self.equal = True

    def update(self, pair: Pair) -> None:
        """Adds the sampled tokens of one batch."""
        index, kernels, own = batch_groups(pair.side, self.group, self.seed)
        bucket = _bucket(pair.side)
        if pair.same_rows:
            both = student = own
        else:
            self.equal = False
            theirs = centred_kernels(pair.rows[index])
            both, student = hsic(kernels, theirs), hsic(theirs, theirs)
        self.sums[0, bucket] += float(both.sum())
        self.sums[1, bucket] += float(student.sum())
        self.tokens[bucket] += index.numel()

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

    def cka(self, seed: int = 0) -> tuple[float, float, float]:
        """Value, lo, hi of sum HSIC_u(x, y) / sqrt(sum HSIC_u(x, x) sum HSIC_u(y, y))."""
        used = self.pair.tokens > 0
        if self.equal:
            return (1.0, 1.0, 1.0) if used.sum() > 1 else (1.0, math.nan, math.nan)
        xy, xx, yy = (
            part[used] for part in (self.pair.sums[0], self.teacher.own, self.pair.sums[1])
        )
        return bootstrap(lambda total: _cka(total(xy), total(xx), total(yy)), len(xy), seed)


def batch_groups(side: TeacherSide, group: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The groups of one batch, shared by all students.

    Returns:
        index: int64 `groups tokens`, rows of `side.rows`; kernels: `groups tokens tokens`;
        own: float64 `groups`, HSIC_u of the teacher with itself.
    """
    key = f"groups {group} {seed}"
    if key not in side.cache:
        rows = side.rows
        n = len(rows)
        count = max(1, n // group) if n >= SMALLEST_GROUP else 0
        size = n // count if count else 0
        index = _shuffle(side, n, seed)[: count * size].view(count, size).to(rows.device)
        kernels = centred_kernels(rows[index])
        side.cache[key] = index, kernels, hsic(kernels, kernels)
    return side.cache[key]


def centred_kernels(x: Tensor) -> Tensor:
    """`groups tokens tokens`: linear kernels of `groups tokens d`, each group centred first."""
    x = x - x.mean(1, keepdim=True)
    return x @ x.transpose(1, 2)


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Float64 `groups`: HSIC_u (Song et al. 2012, eq. 5) of kernels of centred data.

    For those it is [sum_ij K L - n/(n-2) sum_i K_ii L_ii + tr K tr L / ((n-1)(n-2))] / (n(n-3)).
    """
    n = k.shape[1]
    if n < SMALLEST_GROUP:
        return torch.zeros(len(k), dtype=torch.float64, device=k.device)
    a, b = k.diagonal(dim1=1, dim2=2).double(), l.diagonal(dim1=1, dim2=2).double()
    whole = (k * l).sum((1, 2), dtype=torch.float64)
    inner = whole - n / (n - 2) * (a * b).sum(1) + a.sum(1) * b.sum(1) / ((n - 1) * (n - 2))
    return inner / (n * (n - 3))


def _shuffle(side: TeacherSide, n: int, seed: int) -> Tensor:
    first = int(side.docs[0]) if len(side.docs) else 0
    generator = torch.Generator().manual_seed((seed * 1_000_003 + first) % 2**63)
    return torch.randperm(n, generator=generator)


def _bucket(side: TeacherSide) -> int:
    return int(side.docs[0]) % BUCKETS if len(side.docs) else 0


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
