"""Outlier channels: is the energy spread over the channels, or in a few?

Definition: mean_j(s_j^2) / (mean_j s_j)^2, s_j = mean over tokens of x_tj^2 (mean not removed).
1 = all channels alike, d = one channel holds everything. Stats: teacher, student,
shift = log2(student / teacher).
Unit: none; shift in log2. Range: [1, d]. Null: shift 0.
Leaves out position 0 and massive tokens (one of them rules it; see `massive`) and uses a sample
of the rest. nan for a side that is all zero. No interval.
Source: He et al. 2024 (arXiv 2405.19279), eq. 3 (kurtosis of the channels' root mean squares).
"""

from __future__ import annotations

from mismatch.metrics.base import Metric, Moments, Reading, three
from mismatch.metrics.sums.gaussian import kurtosis


class Kurtosis(Metric):
    unit = "log2 ratio"
    range = "[-log2 d, log2 d]"
    better = "none"
    null = {"shift": 0.0}
    headline = "shift"
    invariant = ("permutation", "scale")
    blind = "which channels are the outliers"
    source = "He et al. 2024, arXiv 2405.19279, eq. 3"
    at = "stream"
    mask = "sample"
    state = "moments"

    def read(self, state: Moments) -> list[Reading]:
        teacher = kurtosis(state.teacher)
        student = teacher if state.equal else kurtosis(state.student)
        return three(teacher, student, state.n, state.equal)
