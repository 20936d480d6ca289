"""Debiased linear CKA: is the geometry between tokens still the same?

Definition: HSIC_u(X, Y) / sqrt(HSIC_u(X, X) HSIC_u(Y, Y)) with linear kernels, where for CENTRED
X, Y (n tokens), a_i = |x_i|^2, b_i = |y_i|^2
    n (n - 3) HSIC_u = |X'Y|_F^2 - n/(n-2) sum a_i b_i + sum a sum b / ((n-1)(n-2)).
Stats: value = CKA, shift = 1 - CKA. A ratio of unbiased terms: debiased, not unbiased.
Unit: none. Range: value at most 1, may fall under 0 for unrelated data. Null: value 1, shift 0.
Leaves out position 0 and massive tokens (one such token outweighs all others: with position 0
kept, a model with a random attention layer scores 0.99998), and uses a sample of the rest.
nan where a side is constant, or with fewer than 4 tokens. No interval: its sums are not kept per
document; `cka_minibatch` has one.
Source: Kornblith et al. 2019 (arXiv 1905.00414), section 3; Song et al. 2012, eq. 5;
recommended for n < d by Murphy et al. 2024 (arXiv 2405.01012).
"""

from __future__ import annotations

import math

from mismatch.metrics.base import Metric, Moments, Reading


class CKA(Metric):
    unit = "1 - CKA"
    range = "[0, 1], a little beyond by chance"
    better = "lower"
    null = {"value": 1.0, "shift": 0.0}
    headline = "shift"
    invariant = ("rotation", "permutation", "scale", "shift")
    blind = (
        "rotation, scale and a constant added to every token, each of which breaks the next "
        "layer; dominated by the directions of largest variance"
    )
    source = "Kornblith et al. 2019, arXiv 1905.00414; debiased with Song et al. 2012, eq. 5"
    at = "stream"
    mask = "sample"
    state = "moments"

    def read(self, state: Moments) -> list[Reading]:
        both, teacher, student = state.hsics()
        defined = teacher > 0 and student > 0
        value = both / math.sqrt(teacher * student) if defined else math.nan
        value = 1.0 if state.equal else value
        return [Reading("value", value, n=state.n), Reading("shift", 1 - value, n=state.n)]
