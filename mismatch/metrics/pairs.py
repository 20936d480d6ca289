"""`Pair`: one site, one batch, teacher beside student, with what several metrics need of it.

Everything that depends on the teacher only (`TeacherSide`) is worked out once and shared by all
students of the batch: `first.with_student(other)`. Nothing is computed before a metric asks.
Half types are widened to float32 before any arithmetic; float64 stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

MASSIVE_ABOVE = 100.0  # Sun et al. 2024 (arXiv 2402.17762), section 2: magnitude above 100 ...
MASSIVE_TIMES = 1000.0  # ... and about 1000 times the median magnitude of its hidden state
LOG2_LIMIT = 24.0  # a norm under 2**-24 of the other is "gone": float32 resolves no more


def wide(x: Tensor) -> Tensor:
    """float64 stays, every other type becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def log2_ratio(student: Tensor, teacher: Tensor) -> Tensor:
    """log2(student / teacher) of non-negative numbers: exactly 0 where equal, held in +-24."""
    ratio = torch.log2(student / teacher).clamp(-LOG2_LIMIT, LOG2_LIMIT)
    return torch.where(student == teacher, torch.zeros_like(ratio), ratio)


def peaks(h: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitude per token, and the number of massive channels per token.

    A channel is massive when |h| > 100 and |h| >= 1000 times the median |h| of the same token's
    channels (Sun et al. 2024, section 2; "its hidden state" read as the token's own vector).

    Args:
        h: `... d_model`.

    Returns:
        peak (float32 or float64) and count (int64), both `...`.
    """
    low, high = torch.aminmax(wide(h), dim=-1)
    peak = torch.maximum(high, -low)
    count = torch.zeros(peak.shape, dtype=torch.int64, device=h.device)
    suspects = peak > MASSIVE_ABOVE  # few, so the median is cheap
    size = wide(h[suspects]).abs()
    if len(size):
        border = (MASSIVE_TIMES * size.median(-1, keepdim=True).values).clamp(min=MASSIVE_ABOVE)
        count[suspects] = ((size >= border) & (size > MASSIVE_ABOVE)).sum(-1)
    return peak, count


def massive_tokens(h: Tensor) -> Tensor:
    """Bool `batch pos`: tokens with at least one massive channel in `h` (`batch pos d_model`)."""
    return peaks(h)[1] > 0


@dataclass
class TeacherSide:
    """The part of a pair that all students of a batch share. Fields as in `Pair`."""

    teacher: Tensor
    docs: Tensor
    valid: Tensor
    bulk: Tensor
    sample: Tensor
    before: Tensor | None = None
    cache: dict[str, Any] = field(default_factory=dict, repr=False)  # what accumulators share

    @cached_property
    def wide(self) -> Tensor:
        return wide(self.teacher)

    @cached_property
    def norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.wide, dim=-1)

    @cached_property
    def before_norm(self) -> Tensor:
        return torch.linalg.vector_norm(wide(self.before), dim=-1)

    @cached_property
    def unit(self) -> Tensor:
        return _unit(self.wide, self.norm)

    @cached_property
    def peaks(self) -> tuple[Tensor, Tensor]:
        return peaks(self.teacher)

    @cached_property
    def positions(self) -> Tensor:
        return torch.arange(self.teacher.shape[1], device=self.teacher.device)[None]

    @cached_property
    def halves(self) -> tuple[Tensor, int]:
        """Flat index of the sampled tokens, those of even documents first, and how many those are."""
        even = (self.docs % 2 == 0)[:, None]
        first = (self.sample & even).flatten().nonzero().squeeze(1)
        second = (self.sample & ~even).flatten().nonzero().squeeze(1)
        return torch.cat([first, second]), len(first)

    @cached_property
    def rows(self) -> Tensor:
        """`tokens d_model`: the sampled tokens, widened."""
        return self.pick(self.teacher)

    def pick(self, x: Tensor) -> Tensor:
        """The sampled tokens of `x` (`batch pos d`), in the order of `halves`, widened."""
        rows = wide(x.flatten(0, 1).index_select(0, self.halves[0]))
        return rows.cpu() if rows.device.type == "mps" else rows  # no float64 sums on mps


@dataclass
class Pair:
    """One site, one batch.

    Args:
        teacher, student: `batch pos d_model`, model dtype.
        docs: int64 `batch`: number of the document that each row belongs to.
        valid: bool `batch pos`: real tokens.
        bulk: bool `batch pos`: valid, position > 0, not massive in the teacher.
        sample: bool `batch pos`: the part of bulk that second-moment metrics use.
        before: the stream that this update is added to (teacher, student); for `update_size`.
    """

    teacher: Tensor
    student: Tensor
    docs: Tensor
    valid: Tensor
    bulk: Tensor
    sample: Tensor
    before: tuple[Tensor, Tensor] | None = None
    side: TeacherSide = field(default=None, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.side is None:
            before = None if self.before is None else self.before[0]
            self.side = TeacherSide(
                self.teacher, self.docs, self.valid, self.bulk, self.sample, before
            )

    def with_student(self, student: Tensor, before: Tensor | None = None) -> Pair:
        """The same teacher, tokens and caches beside another student (and the stream before it)."""
        both = None if before is None or self.side.before is None else (self.side.before, before)
        return Pair(
            self.teacher, student, self.docs, self.valid, self.bulk, self.sample, both, self.side
        )

    @property
    def positions(self) -> Tensor:
        return self.side.positions

    @property
    def token_docs(self) -> Tensor:
        return self.docs[:, None]

    @cached_property
    def wide(self) -> Tensor:
        return wide(self.student)

    @cached_property
    def norm(self) -> Tensor:
        """`batch pos`: L2 norm of the student's vectors."""
        return torch.linalg.vector_norm(self.wide, dim=-1)

    @cached_property
    def distance(self) -> Tensor:
        """`batch pos`: ||student - teacher||."""
        return torch.linalg.vector_norm(self.wide - self.side.wide, dim=-1)

    @cached_property
    def chord2(self) -> Tensor:
        """`batch pos`: squared distance of the two unit vectors = 2 - 2 cos, in 0..4.

        In this form it is exactly 0 at equality and exact to rounding near it. A zero vector has
        no direction: against a non-zero one it counts as orthogonal (2), against zero as equal (0).
        """
        gap = _unit(self.wide, self.norm) - self.side.unit
        chord2 = torch.linalg.vector_norm(gap, dim=-1).square().clamp(max=4.0)
        one_is_zero = (self.norm == 0) != (self.side.norm == 0)
        return torch.where(one_is_zero, torch.full_like(chord2, 2.0), chord2)

    @cached_property
    def rows(self) -> Tensor:
        """`tokens d_model`: the student's sampled tokens, in the order of the teacher's."""
        return self.side.pick(self.student)

    @cached_property
    def same_rows(self) -> bool:
        """Whether the sampled tokens are bit-equal in teacher and student."""
        return torch.equal(self.side.rows, self.rows)


def _unit(x: Tensor, norm: Tensor) -> Tensor:
    return x * torch.where(norm == 0, torch.ones_like(norm), norm).reciprocal()[..., None]
