"""Sums over documents: differences, ratios, the share of a gap that is closed, and the one interval behind them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from mismatch.errors import RunError
from mismatch.metrics.base import PerDocument
from mismatch.metrics.sums.per_document import estimate


@pytest.fixture
def both():
    draw = np.random.default_rng(0)
    counts = draw.integers(4, 40, 15)  # positive, as a KL is
    swapped = counts * draw.gamma(2.0, 1.0, 15)
    left = swapped * draw.uniform(0.2, 0.4, 15)
    return PerDocument(left, counts, positive=True), PerDocument(swapped, counts, positive=True)


def test_the_share_of_a_gap_leaves_a_document_out_on_both_sides(both):
    repaired, swapped = both
    value, lo, hi, n, over = repaired.gap_closed(swapped)
    assert value == 1 - repaired.total / swapped.total
    assert n == repaired.n == swapped.n and over == "documents"
    logs = [
        math.log(np.delete(repaired.sums, i).sum() / np.delete(swapped.sums, i).sum())
        for i in range(15)
    ]
    left = math.log(1 - value)
    error = math.sqrt(sum((x - left) ** 2 for x in logs))
    shares = repaired.counts / repaired.n
    reach = stats.t.ppf(0.975, 1 / (shares**2).sum() - 1) * error
    assert (lo, hi) == pytest.approx((1 - math.exp(left + reach), 1 - math.exp(left - reach)))
    # Shares vary less than either KL: paired, the interval is far narrower.
    assert hi - lo < 0.1 < swapped.mean().hi - swapped.mean().lo


def test_a_ratio_and_its_gap_are_one_number(both):
    repaired, swapped = both
    ratio, closed = repaired.over(swapped), repaired.gap_closed(swapped)
    assert closed[:3] == pytest.approx((1 - ratio.value, 1 - ratio.hi, 1 - ratio.lo), rel=1e-12)
    assert closed.hi < 1


def test_without_damage_there_is_no_gap(both):
    nothing = PerDocument(np.zeros(15), both[0].counts)
    assert all(math.isnan(x) for x in both[0].gap_closed(nothing)[:3])
    assert all(math.isnan(x) for x in both[0].over(nothing)[:3])
    assert nothing.gap_closed(both[1])[:3] == (1.0, 1.0, 1.0)


def test_sums_add_up_and_a_difference_with_itself_is_nothing(both):
    one, other = both
    assert (one + other - other).mean().value == pytest.approx(one.mean().value, rel=1e-12)
    assert (one - one).mean() == (0.0, 0.0, 0.0, one.n, "documents")


def test_documents_without_tokens_take_no_part(both):
    one, other = (
        PerDocument(np.append(side.sums, 0.0), np.append(side.counts, 0), positive=True)
        for side in both
    )
    assert one.mean() == both[0].mean()
    assert one.gap_closed(other) == both[0].gap_closed(both[1])


@pytest.mark.parametrize("how", ["__add__", "__sub__", "over", "gap_closed"])
def test_other_tokens_are_refused(both, how):
    other = PerDocument(both[1].sums, both[1].counts[::-1])
    with pytest.raises(RunError, match="do not fit"):
        getattr(both[0], how)(other)


def test_an_interval_of_any_number_made_of_sums(both):
    a, b = (side.sums for side in both)
    counts = both[0].counts
    got = estimate(lambda total: total(a) / total(counts) - total(b) / total(counts), counts)
    assert got[:4] == pytest.approx((both[0] - both[1]).mean()[:4], rel=1e-9)
    assert got.value - got.lo == pytest.approx(got.hi - got.value)
