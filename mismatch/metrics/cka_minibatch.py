"""Minibatch linear CKA: is the geometry between tokens still the same? For wide layers too.

Definition: sum_g HSIC_u(X_g, Y_g) / sqrt(sum_g HSIC_u(X_g, X_g) sum_g HSIC_u(Y_g, Y_g)) over groups
g of sampled tokens of one window, 256 or more where it has as many: sums first, then ONE ratio. (The
mean of the groups' CKAs is another, worse number.) Stats: value, shift = 1 - value.
Unit: none. Range: value at most about 1. Null: value 1, shift 0.
Leaves out position 0 and massive tokens, uses a sample of the rest, and the few that do not fill
a group. Interval: over documents. nan where a side is constant. Groups are windows, not batches: the
number does not depend on --batch-size, but on --seq-len.
Source: Nguyen et al. 2020 (arXiv 2010.15327), section 3.1; Song et al. 2012, eq. 5.
"""

from __future__ import annotations

from mismatch.metrics.base import Groups, Metric, Reading


class MinibatchCKA(Metric):
    unit = "1 - CKA"
    range = "[0, 1], a little beyond by chance"
    better = "lower"
    null = {"value": 1.0, "shift": 0.0}
    headline = "shift"
    invariant = ("rotation", "permutation", "scale", "shift")
    blind = (
        "as cka; besides, groups do not cross windows, so differences between windows and between "
        "documents do not count"
    )
    source = "Nguyen et al. 2020, arXiv 2010.15327, section 3.1"
    at = "stream"
    mask = "sample"
    state = "minibatch"

    def read(self, state: Groups) -> list[Reading]:
        found = state.cka()
        shift = found._replace(value=1 - found.value, lo=1 - found.hi, hi=1 - found.lo)
        return [Reading.of("value", found), Reading.of("shift", shift)]
