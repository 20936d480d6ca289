"""`LogitPair`: log-probabilities of teacher and student for one chunk of tokens.

Divergences are summed over blocks of a few rows that fit into the processor's cache: at a
vocabulary of 49k, passes over the whole chunk would cost more than the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

TOP = 5
BLOCK = 1 << 17  # numbers per block: half a megabyte of float32
SAFE = 60.0  # exp(d) stays far from float32's overflow at 88


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
    shared: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def with_student(self, student: Tensor) -> LogitPair:
        """The same teacher and tokens beside another student; the teacher's top-5 is shared."""
        return LogitPair(
            self.teacher, student, self.targets, self.docs, self.positions, self.shared
        )

    @property
    def token_docs(self) -> Tensor:
        return self.docs

    @cached_property
    def valid(self) -> Tensor:
        return torch.ones_like(self.targets, dtype=torch.bool)

    @cached_property
    def has_target(self) -> Tensor:
        return self.targets >= 0

    @cached_property
    def kl(self) -> Tensor:
        """KL(teacher || student) per token in nats, >= 0, exactly 0 at equality.

        sum p (expm1(d) - d) with d = log q - log p: equal to sum p (log p - log q) because both
        distributions sum to 1, but every term is >= 0, so nothing cancels.
        """
        return self._sum(_kl_terms)

    @cached_property
    def js(self) -> Tensor:
        """Jensen-Shannon divergence per token in nats, in 0..ln 2, exactly 0 at equality."""
        return self._sum(_js_terms)

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

    def _sum(self, terms) -> Tensor:
        out = self.teacher.new_empty(len(self.teacher))
        step = max(1, BLOCK // self.teacher.shape[1]) if self.teacher.device.type == "cpu" else 64
        for i in range(0, len(out), step):
            t, s = self.teacher[i : i + step], self.student[i : i + step]
            torch.sum(terms(t, s), dim=1, out=out[i : i + step])
        return out.clamp_(min=0.0)  # rounding far below 1e-12 could leave the sum under 0


def _kl_terms(t: Tensor, s: Tensor) -> Tensor:
    d = s - t
    p = t.exp()
    if d.numel() and d.max() > SAFE:  # expm1 would overflow: p expm1(d) = q - p, nothing cancels
        near = torch.expm1(d.clamp(max=1.0)).mul_(p)
        return torch.where(d > 1.0, s.exp().sub_(p), near).sub_(d.mul_(p))
    return torch.expm1(d).sub_(d).mul_(p)


def _js_terms(t: Tensor, s: Tensor) -> Tensor:
    """(p + q) / 2 * k with k = h tanh h - log cosh h, h = |d| / 2: each term is >= 0.

    With w = expm1(-|d|): tanh h = -w / (2 + w), log cosh h = h + log1p(w / 2).
    """
    a = (s - t).abs_()
    w = torch.expm1(-a)
    k = a.mul_(w + 1).div_(w + 2).neg_().sub_(w.mul_(0.5).log1p_())
    return k.mul_(t.exp().add_(s.exp())).mul_(0.5)


def _top(log_probs: Tensor) -> Tensor:
    return log_probs.topk(min(TOP, log_probs.shape[1]), dim=1).indices
