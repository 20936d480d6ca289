"""`Pair`: one site, one batch, teacher beside student, with what several metrics need of it.

Everything that depends on the teacher only (`TeacherSide`) is computed once and shared by all
students of the batch: `first.with_student(other)`. Nothing is computed before a metric uses it.
Half types are widened to float32 before any arithmetic; float64 stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mismatch.metrics.sums.tokens import Kept

MASSIVE_ABOVE = 100.0  # Sun et al. 2024 (arXiv 2402.17762), section 2: magnitude above 100 ...
MASSIVE_TIMES = 1000.0  # ... and about 1000 times the median magnitude of its hidden state
BLOCK = 64  # tokens per block: small enough for the processor's cache
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
    peak = wide(torch.maximum(h.amax(-1), -h.amin(-1)))  # aminmax is 20 times slower on CPU
    count = torch.zeros(peak.shape, dtype=torch.int64, device=h.device)
    flat, flat_peak = h.flatten(0, -2), peak.flatten()
    at = (flat_peak > MASSIVE_ABOVE).nonzero().squeeze(1)
    size = wide(flat[at]).abs()
    # The peak reaches 1000 medians only if half of the channels lie below a thousandth of it: counting
    # those is far cheaper than a median, and leaves few tokens.
    below = (size * MASSIVE_TIMES <= flat_peak[at][:, None]).sum(-1)
    some = below > (h.shape[-1] - 1) // 2
    at, size = at[some], size[some]
    if len(at):
        border = (MASSIVE_TIMES * size.median(-1, keepdim=True).values).clamp(min=MASSIVE_ABOVE)
        count.view(-1)[at] = ((size >= border) & (size > MASSIVE_ABOVE)).sum(-1)
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
    def norm(self) -> Tensor:
        """`batch pos`: L2 norm of the teacher's vectors."""
        return _norm(self.teacher)

    @cached_property
    def before_norm(self) -> Tensor:
        """`batch pos`: norm of the stream that the teacher's update is added to."""
        return _norm(self.before)  # type: ignore[arg-type]  # update_size uses it only where it is

    @cached_property
    def peaks(self) -> tuple[Tensor, Tensor]:
        """`peaks` of the teacher's vectors."""
        return peaks(self.teacher)

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

    def kept(self, mask: str) -> Kept:
        """The tokens of a mask ("valid", "bulk", "sample"), listed once per batch."""
        if mask not in self.side.cache:
            positions = torch.arange(self.teacher.shape[1], device=self.docs.device)[None]
            self.side.cache[mask] = Kept.of(getattr(self, mask), self.docs[:, None], positions)
        return self.side.cache[mask]

    @cached_property
    def norm(self) -> Tensor:
        """`batch pos`: L2 norm of the student's vectors."""
        return _norm(self.student)

    @cached_property
    def before_norm(self) -> Tensor:
        """`batch pos`: norm of the stream that the student's update is added to."""
        return _norm(self.before[1])  # type: ignore[index]

    @cached_property
    def distance(self) -> Tensor:
        """`batch pos`: ||student - teacher||."""
        return self._by_block(lambda t, s, _t, _s: s - t)

    @cached_property
    def chord2(self) -> Tensor:
        """`batch pos`: squared distance of the two unit vectors = 2 - 2 cos, in 0..4.

        In this form it is exactly 0 at equality and exact to rounding near it. A zero vector has
        no direction: against a non-zero one it counts as orthogonal (2), against zero as equal (0).
        """
        chord = self._by_block(lambda t, s, t_norm, s_norm: (s * s_norm).sub_(t * t_norm), True)
        chord2 = chord.square().clamp(max=4.0)
        one_is_zero = (self.norm == 0) != (self.side.norm == 0)
        return torch.where(one_is_zero, torch.full_like(chord2, 2.0), chord2)

    def _by_block(self, gap: Callable[..., Tensor], unit: bool = False) -> Tensor:
        """Norm over channels of `gap`, a few tokens at a time so that it stays in the cache."""
        tokens = self.norm.numel()
        step = BLOCK if self.student.device.type == "cpu" else tokens
        t, s = self.teacher.flatten(0, 1), self.student.flatten(0, 1)
        one = torch.ones_like(self.norm)
        scales = [
            torch.where(n == 0, one, n).reciprocal().view(-1, 1) if unit else one.view(-1, 1)
            for n in (self.side.norm, self.norm)
        ]
        parts = [
            _norm(gap(*(wide(x[i : i + step]) for x in (t, s)), *(x[i : i + step] for x in scales)))
            for i in range(0, tokens, step)
        ]
        return torch.cat(parts).view_as(self.norm) if parts else self.norm.clone()

    @cached_property
    def rows(self) -> Tensor:
        """`tokens d_model`: the student's sampled tokens, in the order of the teacher's."""
        return self.side.pick(self.student)

    @cached_property
    def same_rows(self) -> bool:
        """Whether the sampled tokens are bit-equal in teacher and student."""
        return torch.equal(self.side.rows, self.rows)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
