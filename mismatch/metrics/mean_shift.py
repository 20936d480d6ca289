"""Mean shift: how far did the average vector move, against the spread of the teacher's tokens?

Definition: ||mean_s - mean_t|| / sqrt(tr S_t), S_t the teacher's covariance (divided by n - 1).
1 = the mean moved by one standard deviation of the whole cloud.
Unit: teacher standard deviations. Range: [0, inf). Null: 0.
Leaves out position 0 and massive tokens (they would be both the mean and the spread) and uses a
sample of the rest. nan with fewer than 2 tokens or a constant teacher. No interval.
Source: plain definition; its square is the mean term of the Frechet distance.
"""

from __future__ import annotations

import math

from mismatch.metrics.base import Metric, Moments, Reading
from mismatch.metrics.sums.gaussian import mean_gap2


class MeanShift(Metric):
    unit = "teacher standard deviations"
    range = "[0, inf)"
    better = "lower"
    null = {"value": 0.0}
    headline = "value"
    invariant = ("joint rotation",)
    blind = "everything but the mean: a change that averages out over tokens reads 0"
    source = "definition: ||mean_s - mean_t|| / sqrt(tr S_t)"
    at = "stream"
    mask = "sample"
    state = "moments"

    def read(self, state: Moments) -> list[Reading]:
        spread = state.teacher.trace
        gap2 = mean_gap2(state.teacher, state.student)
        value = math.sqrt(gap2 / spread) if spread > 0 else math.nan
        value = 0.0 if state.equal else value
        return [Reading("value", value, n=state.n)]
