"""Distances between two laws known by mean and covariance, in float64: `Gaussian` and friends.

Bures / Frechet: Heusel et al. 2017 (arXiv 1706.08500), eq. 6. Gaussian KL after shrinkage by
Ledoit and Wolf 2004 ("A well-conditioned estimator for large-dimensional covariance matrices",
section 3.3): without it the covariance is singular below d tokens. Effective rank: Roy and
Vetterli 2007.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor


class Gaussian:
    """Mean and second moments of n rows.

    Args:
        n: rows.
        mean: `d`, float64.
        scatter: `d d`, float64: sum of (x - mean)(x - mean)'.
        fourth: sum of |x - mean|^4; the shrinkage needs it.
    """

    def __init__(self, n: int, mean: Tensor, scatter: Tensor, fourth: float) -> None:
        self.n, self.mean, self.scatter, self.fourth = n, mean, scatter, fourth
        self.d = len(mean)

    @cached_property
    def covariance(self) -> Tensor:
        """`d d`, divided by n - 1; symmetric to the last bit."""
        return (self.scatter + self.scatter.T) / (2 * max(self.n - 1, 1))

    @cached_property
    def trace(self) -> float:
        """Total variance."""
        return float(self.covariance.trace())

    @cached_property
    def power(self) -> Tensor:
        """`d`: mean of x^2 per channel, mean not removed."""
        return self.scatter.diagonal() / max(self.n, 1) + self.mean.square()

    @property
    def rank(self) -> int:
        """Most eigenvalues that can differ from 0."""
        return max(min(self.d, self.n - 1), 0)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Of the covariance, largest first, only the `rank` that can differ from 0, none below 0."""
        return torch.linalg.eigvalsh(self.covariance).flip(0)[: self.rank].clamp(min=0.0)

    @cached_property
    def factor(self) -> Tensor:
        """`d k` with factor factor' = covariance."""
        low, info = torch.linalg.cholesky_ex(self.covariance)
        if int(info) == 0 and self.rank == self.d:
            return low
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0.0).sqrt()

    @cached_property
    def shrinkage(self) -> float:
        """Ledoit-Wolf share in 0..1 of the identity's multiple."""
        s = self.scatter / self.n
        mu = float(s.trace()) / self.d
        square = float((s * s).sum())
        spread = square - self.d * mu * mu  # distance of the covariance from mu times identity
        noise = (self.fourth / self.n - square) / self.n
        return 1.0 if spread <= 0 else min(max(noise, 0.0), spread) / spread

    @cached_property
    def shrunk(self) -> tuple[Tensor, float]:
        """Cholesky factor of the shrunk covariance (divided by n) and its log determinant.

        The factor holds nan and the determinant is -inf where the law is a single point.
        """
        s = self.scatter / max(self.n, 1)
        share = self.shrinkage
        mixed = (1 - share) * (s + s.T) / 2
        mixed.diagonal().add_(share * float(s.trace()) / self.d)
        low, info = torch.linalg.cholesky_ex(mixed)
        if int(info) != 0:
            return torch.full_like(low, math.nan), -math.inf
        return low, 2 * float(low.diagonal().log().sum())


def mean_gap2(a: Gaussian, b: Gaussian) -> float:
    """Squared distance of the means."""
    return float((a.mean - b.mean).square().sum())


def frechet2(a: Gaussian, b: Gaussian) -> float:
    """|mean gap|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2, covariances divided by n - 1; >= 0.

    nan with fewer than two rows on a side.
    """
    if min(a.n, b.n) < 2:
        return math.nan
    inner = a.factor.T @ b.covariance @ a.factor
    values = torch.linalg.eigvalsh((inner + inner.T) / 2).flip(0)[: min(a.rank, b.rank)]
    overlap = float(values.clamp(min=0.0).sqrt().sum())
    return mean_gap2(a, b) + max(a.trace + b.trace - 2 * overlap, 0.0)


def shrunk_kl(a: Gaussian, b: Gaussian) -> float:
    """KL(a || b) in nats of two Gaussians with Ledoit-Wolf covariances; >= 0.

    inf where one of the two is a single point, nan with fewer than two rows on a side.
    """
    if min(a.n, b.n) < 2:
        return math.nan
    (low_a, det_a), (low_b, det_b) = a.shrunk, b.shrunk
    if math.isinf(det_a) or math.isinf(det_b):
        return math.inf
    ratio = torch.linalg.solve_triangular(low_b, low_a, upper=False)
    gap = torch.linalg.solve_triangular(low_b, (a.mean - b.mean)[:, None], upper=False)
    spread = float(ratio.square().sum()) + float(gap.square().sum())
    return max(0.5 * (spread - a.d + det_b - det_a), 0.0)


def effective_rank(law: Gaussian) -> float:
    """exp of the entropy of the singular values of the centred data, normalised to sum 1."""
    sigma = law.eigenvalues.sqrt()
    total = float(sigma.sum())
    if total == 0 or law.rank == 0:
        return math.nan
    p = sigma / total
    return math.exp(float(torch.special.entr(p).sum()))


def participation_ratio(law: Gaussian) -> float:
    """(tr S)^2 / tr S^2: needs no eigenvalues."""
    square = float(law.covariance.square().sum())
    return math.nan if square == 0 or law.rank == 0 else law.trace**2 / square


def kurtosis(law: Gaussian) -> float:
    """mean_j s_j^2 / (mean_j s_j)^2 with s_j the mean square of channel j; between 1 and d."""
    mean = float(law.power.mean())
    return math.nan if mean == 0 or law.n == 0 else float(law.power.square().mean()) / mean**2
