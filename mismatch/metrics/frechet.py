"""Frechet distance: how far apart are the two clouds of tokens, by mean and covariance?

Definition: [ |mean_s - mean_t|^2 + tr S_s + tr S_t - 2 tr (S_t^1/2 S_s S_t^1/2)^1/2 ] / tr S_t, with
covariances divided by n - 1; without the first term it is the Bures distance. Stats: value;
null = the same number between the teacher's even and odd documents: what two samples of ONE law
read at half of the tokens.
Unit: share of the teacher's total variance. Range: [0, inf). Null: value 0 (same tokens).
Teacher and student see the same tokens, so the floor of `value` is 0 and not `null`; `null` is
what the number reads on different text. Unusable as an absolute under about 20 d tokens.
Leaves out position 0 and massive tokens (one of them is most of the variance) and uses a sample
of the rest. `null` is nan where one half has fewer than 2 tokens. No interval.
Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6; Bhatia et al. 2019 for Bures.
"""

from __future__ import annotations

import math

from mismatch.metrics.base import Metric, Moments, Reading
from mismatch.metrics.sums.gaussian import frechet2


class Frechet(Metric):
    unit = "share of the teacher's total variance"
    range = "[0, inf)"
    better = "lower"
    null = {"value": 0.0}
    headline = "value"
    invariant = ("joint rotation",)
    blind = "which token moved where (it compares clouds, not pairs); anything beyond two moments"
    source = "Heusel et al. 2017, arXiv 1706.08500, eq. 6"
    at = "stream"
    mask = "sample"
    state = "moments"

    def read(self, state: Moments) -> list[Reading]:
        spread = state.teacher.trace
        spread = spread if spread > 0 else math.nan
        value = 0.0 if state.equal else frechet2(state.teacher, state.student) / spread
        null = state.view.null("frechet", frechet2) / spread
        return [Reading("value", value, n=state.n), Reading("null", null, n=state.n)]
