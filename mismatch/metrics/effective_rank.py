"""Effective rank: over how many directions do the tokens spread?

Definition: exp(- sum_i p_i ln p_i), p_i = sigma_i / sum sigma, sigma the singular values of the
centred tokens (the square roots of the covariance's eigenvalues). Stats: teacher, student,
shift = log2(student / teacher).
Unit: directions; shift in log2. Range: [1, min(d, n - 1)]. Null: shift 0.
Biased down while n is not far above d, on both sides alike: compare, do not quote.
Leaves out position 0 and massive tokens (with them the rank reads 1) and uses a sample of the rest.
nan for a constant side. No interval.
Source: Roy and Vetterli 2007, "The effective rank", eq. 4 (with singular values, as there; the
form with eigenvalues and the uncentred RankMe give other numbers).
"""

from __future__ import annotations

from mismatch.metrics.base import Metric, Moments, Reading, three
from mismatch.metrics.sums.gaussian import effective_rank


class EffectiveRank(Metric):
    unit = "log2 ratio of directions"
    range = "[-log2 d, log2 d]"
    better = "none"
    null = {"shift": 0.0}
    headline = "shift"
    invariant = ("rotation", "permutation", "scale", "shift")
    blind = "which directions: a cloud of the same shape in other directions reads 0"
    source = "Roy and Vetterli 2007, eq. 4"
    at = "stream"
    mask = "sample"
    state = "moments"

    def read(self, state: Moments) -> list[Reading]:
        teacher = effective_rank(state.teacher)
        student = teacher if state.equal else effective_rank(state.student)
        return three(teacher, student, state.n, state.equal)
