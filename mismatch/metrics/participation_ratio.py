"""Participation ratio: how many directions hold the variance?

Definition: (sum_i l_i)^2 / sum_i l_i^2 over the eigenvalues l of the covariance, computed as
(tr S)^2 / tr S^2. Stats: teacher, student, shift = log2(student / teacher). Stricter than the effective
rank: small variances hardly count.
Unit: directions; shift in log2. Range: [1, min(d, n - 1)]. Null: shift 0.
Leaves out position 0 and massive tokens (with them it reads 1) and uses a sample of the rest.
nan for a constant side. No interval.
Source: Gao et al. 2017 (bioRxiv 214262), "A theory of multineuronal dimensionality".
"""

from __future__ import annotations

from mismatch.metrics.base import Metric, Moments, Reading, three
from mismatch.metrics.sums.gaussian import participation_ratio


class ParticipationRatio(Metric):
    unit = "log2 ratio of directions"
    range = "[-log2 d, log2 d]"
    better = "none"
    null = {"shift": 0.0}
    headline = "shift"
    invariant = ("rotation", "permutation", "scale", "shift")
    blind = "which directions, and the many small ones"
    source = "Gao et al. 2017, bioRxiv 214262"
    at = "stream"
    mask = "sample"
    state = "moments"

    def read(self, state: Moments) -> list[Reading]:
        teacher = participation_ratio(state.teacher)
        student = teacher if state.equal else participation_ratio(state.student)
        return three(teacher, student, state.n, state.equal)
