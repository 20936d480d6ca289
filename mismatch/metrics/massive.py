"""Massive activations: are the few huge numbers that models rely on still there?

Definition: a channel of a token is massive when |h| > 100 and |h| >= 1000 times the median |h| of that
token. Stats: shift = mean over tokens of log2(largest |h| of the student / of the teacher); teacher,
student = the largest |h| of all; teacher_tokens, student_tokens = share of tokens with a massive
channel; teacher_channels, student_channels = the most massive channels in one token.
Unit: log2 of a ratio; |h|; shares. Range: shift held in [-24, 24]. Null: shift 0.
Uses every real token, position 0 included: that is where they live.
Source: Sun et al. 2024 (arXiv 2402.17762), section 2 (the definition's two borders).
"""

from __future__ import annotations

from torch import Tensor

from mismatch.metrics.base import Pair, TokenMetric
from mismatch.metrics.sums.pairs import log2_ratio, peaks


class Massive(TokenMetric):
    unit = "log2 ratio of the largest |h|"
    range = "[-24, 24]"
    better = "none"
    null = {"shift": 0.0}
    headline = "shift"
    invariant = ("permutation",)
    blind = "where the largest number sits: moving it to another channel reads 0"
    source = "Sun et al. 2024, arXiv 2402.17762, section 2"
    at = "stream"
    mask = "valid"
    stats = {
        "shift": ("shift", "mean"),
        "teacher": ("teacher", "max"),
        "student": ("student", "max"),
        "teacher_tokens": ("teacher_massive", "mean"),
        "student_tokens": ("student_massive", "mean"),
        "teacher_channels": ("teacher_count", "max"),
        "student_channels": ("student_count", "max"),
    }

    def values(self, pair: Pair) -> dict[str, Tensor]:
        teacher, teacher_count = pair.side.peaks
        student, student_count = peaks(pair.student)
        return {
            "shift": log2_ratio(student, teacher),
            "teacher": teacher,
            "student": student,
            "teacher_massive": teacher_count > 0,
            "student_massive": student_count > 0,
            "teacher_count": teacher_count,
            "student_count": student_count,
        }
