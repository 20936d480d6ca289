"""`LogitPair`: log-probabilities of teacher and student for one chunk of tokens.

Divergences are summed over blocks of a few rows that fit into the processor's cache: at a
vocabulary of 49k, passes over the whole chunk would cost more than the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mismatch.metrics.sums.tokens import Kept

TOP = 5
BLOCK = 1 << 17  # numbers per block: half a megabyte of float32
SAFE = 60.0  # exp(d) stays far from float32's overflow at 88
ROWS_ON_GPU = 64  # rows per block there: a matter of memory only


@dataclass
class LogitPair:
    """One chunk of tokens.

    Args:
        teacher, student: `tokens vocab`, float32 (or float64) log-probabilities, all finite: cut
            off a vocabulary masked with -inf first.
        targets: int64 `tokens`: the token that follows, -1 where there is none.
        docs, positions: int64 `tokens`: document number and position of each token.
    """

    teacher: Tensor
    student: Tensor
    targets: Tensor
    docs: Tensor
    positions: Tensor
    joint: bool = False
    """Whether both `kl` and `js` will be used: together they cost less."""
    shared: dict[str, Any] = field(default_factory=dict, repr=False)

    def with_student(self, student: Tensor) -> LogitPair:
        """The same teacher and tokens beside another student; the teacher's top-5 is shared."""
        return LogitPair(
            self.teacher, student, self.targets, self.docs, self.positions, self.joint, self.shared
        )

    def split(self, size: int) -> list[LogitPair]:
        """Parts of so many tokens each."""
        columns = (self.teacher, self.student, self.targets, self.docs, self.positions)
        parts = zip(*(column.split(size) for column in columns), strict=True)
        return [LogitPair(t, s, to, doc, at, self.joint) for t, s, to, doc, at in parts]

    def kept(self, mask: str) -> Kept:
        """The tokens of a mask ("valid": all, "has_target"), listed once per chunk."""
        if mask not in self.shared:
            here = (
                self.targets >= 0 if mask == "has_target" else torch.ones_like(self.targets).bool()
            )
            self.shared[mask] = Kept.of(here, self.docs, self.positions)
        return self.shared[mask]

    @property
    def kl(self) -> Tensor:
        """KL(teacher || student) per token in nats, >= 0, exactly 0 at equality.

        sum p (expm1(d) - d) with d = log q - log p: equal to sum p (log p - log q) because both
        distributions sum to 1, but every term is >= 0, so nothing cancels.
        """
        return self._both[0] if self.joint else self._kl

    @property
    def js(self) -> Tensor:
        """Jensen-Shannon divergence per token in nats, in 0..ln 2, exactly 0 at equality.

        1/2 sum p [(1 + u) d - (2 + u) log1p(u / 2)] with u = expm1(d) = q / p - 1: the divergence
        as a sum of terms that are all >= 0 and that share u with the KL.
        """
        return self._both[1]

    @cached_property
    def _kl(self) -> Tensor:
        return kl_per_token(self.teacher, self.student)

    @cached_property
    def _both(self) -> list[Tensor]:
        return _sums(_both_terms, self.teacher, self.student)

    @cached_property
    def top(self) -> tuple[Tensor, Tensor]:
        """Int64 `tokens 5` twice: the likeliest tokens of teacher and student, best first."""
        if "top" not in self.shared:
            self.shared["top"] = _top(self.teacher)
        return self.shared["top"], _top(self.student)

    @cached_property
    def nll(self) -> tuple[Tensor, Tensor]:
        """-log probability of the target in teacher and student; anything where there is none."""
        column = self.targets.clamp(min=0)[:, None]
        return -self.teacher.gather(1, column)[:, 0], -self.student.gather(1, column)[:, 0]


def kl_per_token(teacher: Tensor, student: Tensor) -> Tensor:
    """`LogitPair.kl` of log-probabilities, `tokens vocab` each."""
    return _sums(_kl_terms, teacher, student)[0]


def kl_float64(teacher: Tensor, student: Tensor) -> Tensor:
    """The same of log-probabilities of any shape, `... vocab`, some of which may be -inf; summed in float64."""
    p, d = teacher.exp(), student.to(teacher.device) - teacher
    # A token that the teacher rules out has p = 0, and its d may be inf - inf.
    return torch.where(p > 0, p * (torch.expm1(d) - d), 0.0).sum(-1, dtype=torch.float64)


def _sums(
    terms: Callable[[Tensor, Tensor], tuple[Tensor, ...]], teacher: Tensor, student: Tensor
) -> list[Tensor]:
    step = max(1, BLOCK // teacher.shape[1]) if teacher.device.type == "cpu" else ROWS_ON_GPU
    blocks = zip(teacher.split(step), student.split(step), strict=True)
    sums = [[x.sum(1) for x in terms(t, s)] for t, s in blocks]
    # rounding, far below 1e-12, could leave a sum under 0
    return [torch.cat(part).clamp_(min=0.0) for part in zip(*sums, strict=True)]


def _kl_terms(t: Tensor, s: Tensor) -> tuple[Tensor]:
    d = s - t
    if d.numel() and d.max() > SAFE:
        return (_far(t, s, d)[0],)
    return (torch.expm1(d).sub_(d).mul_(t.exp()),)


def _both_terms(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    d = s - t
    if d.numel() and d.max() > SAFE:
        return _far(t, s, d)
    u, p = torch.expm1(d), t.exp()
    return _near(p, u, d)


def _near(p: Tensor, u: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Terms of KL and JS from p, u = expm1(d) and d. Uses up u."""
    js = (u * 0.5).log1p_().mul_(u + 2)
    js = (u + 1).mul_(d).sub_(js).mul_(p).mul_(0.5)
    return u.sub_(d).mul_(p), js


def _far(t: Tensor, s: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The same where expm1(d) would overflow: with q = exp(s) for d > 1, where nothing cancels."""
    p, q = t.exp(), s.exp()
    near_kl, near_js = _near(p, torch.expm1(d.clamp(max=1.0)), d.clamp(max=1.0))
    log2, softplus = math.log(2.0), torch.nn.functional.softplus  # log(1 + e^d)
    far_js = (q * (log2 - softplus(-d)) - p * (softplus(d) - log2)) * 0.5
    return torch.where(d > 1.0, q - p - d * p, near_kl), torch.where(d > 1.0, far_js, near_js)


def _top(log_probs: Tensor) -> Tensor:
    return log_probs.topk(min(TOP, log_probs.shape[1]), dim=1).indices
