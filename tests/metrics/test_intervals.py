"""Intervals over documents, position bins, quantiles, and the paired difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from generator import Both, batch, make
from scipy import stats

from mismatch.errors import RunError
from mismatch.metrics.base import Kept, PerDocument, TokenSums
from mismatch.metrics.sums.per_document import MOST, Units
from mismatch.metrics.sums.tokens import bin_names
from mismatch.runs.intervals import BLOCKS, DOCUMENTS


def filled(values, docs, positions=None, *, n_docs=None, n_pos=1, **options):
    values, docs = torch.as_tensor(values), torch.as_tensor(docs)
    positions = torch.zeros_like(docs) if positions is None else torch.as_tensor(positions)
    sums = TokenSums(n_docs or int(docs.max()) + 1, n_pos, **options)
    sums.update({"value": values}, Kept.of(torch.ones_like(docs).bool(), docs, positions))
    return sums


def mean_of(sums, counts, units=DOCUMENTS, **options):
    return PerDocument(sums, counts, units, **options).mean()


def draws(kind, documents, times=2000, seed=5):
    """Numbers of documents with the mean 1, and their lengths: equal, or from one to eight."""
    rng = np.random.default_rng(seed)
    shape = (times, documents)
    counts = np.full(shape, 4) if kind == "equal" else rng.integers(1, 9, shape)
    return counts * rng.lognormal(-0.08, 0.4, shape), counts


def coverage(sums, counts, units=DOCUMENTS, **options):
    found = [mean_of(s, c, units, **options) for s, c in zip(sums, counts, strict=True)]
    return np.mean([one.lo <= 1.0 <= one.hi for one in found])


@pytest.mark.parametrize("documents", [4, 8, 16])
@pytest.mark.parametrize(("kind", "least"), [("equal", 0.93), ("unequal", 0.915)])
def test_interval_covers_the_true_mean_as_often_as_it_says(kind, least, documents):
    """Skewed documents, whose tokens share one number: the percentile bootstrap covers 70 to 91 % of these."""
    got = coverage(*draws(kind, documents, 1000), positive=True)
    assert least <= got <= 0.985


@pytest.mark.parametrize("kind", ["equal", "unequal"])
def test_interval_covers_a_difference_that_may_have_either_sign(kind):
    sums, counts = draws(kind, 8, 1000)
    assert 0.90 <= coverage(sums, counts) <= 0.975


def test_interval_by_hand():
    """The jackknife written out: leave one document out, and Student's t with one degree of freedom less."""
    sums, counts = np.array([1.0, 4.0, 2.0, 6.0, 3.0]), np.full(5, 2)
    without = [np.delete(sums, i).sum() / np.delete(counts, i).sum() for i in range(5)]
    reach = 2.7764451 * math.sqrt(sum((x - 1.6) ** 2 for x in without))
    got = mean_of(sums, counts)
    assert got[:4] == pytest.approx((1.6, 1.6 - reach, 1.6 + reach, 10), rel=1e-7)
    # Of equal documents that is the textbook's interval of a mean, with n - 1 in place of n.
    error = (sums / 2).std(ddof=1) / math.sqrt(4)
    assert reach == pytest.approx(2.7764451 * error, rel=1e-12)


def test_a_number_that_cannot_be_negative_has_no_negative_end():
    sums, counts = np.array([0.1, 0.1, 0.1, 3.0]), np.ones(4, int)
    plain, positive = mean_of(sums, counts), mean_of(sums, counts, positive=True)
    assert plain.lo < 0 < positive.lo < positive.value == plain.value < plain.hi < positive.hi
    assert math.log(positive.value / positive.lo) == pytest.approx(
        math.log(positive.hi / positive.value)
    )
    once = np.array([0.0, 0.0, 0.0, 1.0])  # without the last one it is 0, which has no logarithm
    assert mean_of(once, counts, positive=True).lo == 0.0


def test_documents_of_unequal_length_count_as_fewer():
    sums = np.array([1.0, 4.0, 2.0, 6.0, 3.0])
    equal, unequal = np.full(5, 10), np.array([30, 5, 5, 5, 5])
    widths = [(got := mean_of(sums * n / 10, n)).hi - got.lo for n in (equal, unequal)]
    assert widths[1] > 1.2 * widths[0]


# ---- one long document ------------------------------------------------------------------------


def neighbours(windows, times=1000, rho=0.3, seed=1):
    """Windows of one text whose neighbours are alike."""
    rng = np.random.default_rng(seed)
    x = np.empty((times, windows))
    x[:, 0] = rng.normal(size=times)
    for i in range(1, windows):
        x[:, i] = rho * x[:, i - 1] + math.sqrt(1 - rho**2) * rng.normal(size=times)
    return np.exp(0.4 * x - 0.08)


@pytest.mark.parametrize("windows", [8, 16, 32, 128])
def test_blocks_of_windows_respect_that_neighbours_are_alike(windows):
    sums = neighbours(windows)
    counts = np.ones(sums.shape, int)
    assert 0.90 <= coverage(sums, counts, BLOCKS, positive=True) <= 0.98
    assert coverage(sums, counts, positive=True) < 0.90  # as if windows were independent


def test_moving_blocks_by_hand():
    sums, counts = np.arange(9.0) ** 2, np.arange(1, 10)
    without = [
        np.delete(sums, [i, i + 1]).sum() / np.delete(counts, [i, i + 1]).sum() for i in range(8)
    ]
    value = sums.sum() / counts.sum()
    error = math.sqrt(9 / (2 * 8) * sum((x - value) ** 2 for x in without))
    got = mean_of(sums, counts, BLOCKS)
    reach = stats.t.ppf(0.975, 1.5 * (9 / 2 - 1)) * error
    assert (got.lo, got.hi) == pytest.approx((value - reach, value + reach), rel=1e-9)
    assert got.over == BLOCKS


def test_what_is_a_unit():
    """Four documents are units; windows of fewer are, in the order of the text, where there are eight."""
    docs = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    assert Units.by(docs).over == DOCUMENTS and (Units.by(docs).of == docs).all()
    long = np.array([0, 1, 0, 1, 0, 1, 0, 0])
    assert Units.by(long).over == BLOCKS
    assert Units.by(long).of.tolist() == [0, 5, 1, 6, 2, 7, 3, 4]
    assert Units.by(long, np.arange(8)[::-1]).of.tolist() == [4, 7, 3, 6, 2, 5, 1, 0]
    assert Units.by(long).enough and not Units.by(long[:7]).enough
    assert not Units.by(np.array([0, 1, 2])).enough and Units.by(np.arange(4)).enough
    many = Units.by(np.zeros(3000, int))
    assert many.count == 1000 and (np.diff(many.of) >= 0).all()  # neighbours are one unit


@pytest.mark.parametrize(("units", "most"), [(DOCUMENTS, 3), (BLOCKS, 7)])
def test_too_few_have_no_interval(units, most):
    for n in range(most + 1):
        _value, lo, hi, tokens, over = mean_of(np.arange(n) + 1.0, np.ones(n, int), units)
        assert math.isnan(lo) and math.isnan(hi) and tokens == n and over == ""
    got = mean_of(np.arange(most + 1) + 1.0, np.ones(most + 1, int), units)
    assert got.lo < got.value < got.hi and got.over == units


def test_documents_without_tokens_take_no_part():
    sums, counts = np.array([1.0, 0.0, 5.0, 0.0, 2.0, 3.0]), np.array([2, 0, 2, 0, 2, 2])
    assert mean_of(sums, counts) == mean_of(sums[counts > 0], counts[counts > 0])


def test_a_number_that_hangs_on_one_document_has_no_interval():
    """Without it, there is nothing to divide by."""
    sums, counts = np.array([1.0, 0.0, 0.0, 0.0]), np.ones(4, int)
    found = PerDocument(sums, counts).gap_closed(PerDocument(sums, counts))
    assert found.value == 0.0 and math.isnan(found.lo) and found.over == ""


def test_position_bins():
    assert bin_names(300) == ["0", "1-3", "4-15", "16-63", "64-127", "128-255", "256-299"]
    assert bin_names(1) == ["0"]
    assert bin_names(512)[-1] == "256-511" and bin_names(513)[-1] == "512"


def test_by_position_means_are_those_of_the_bins():
    n_pos = 70
    positions = torch.arange(n_pos).repeat(4)
    docs = torch.arange(4).repeat_interleave(n_pos)
    values = positions.double() + docs
    sums = filled(values, docs, positions, n_pos=n_pos, by_position=True)
    got = {r.position: r for r in sums.by_position("value")}
    assert got["16-63"].value == pytest.approx(np.arange(16, 64).mean() + 1.5)
    assert got["64-69"].n == 4 * 6
    assert got["0"].lo < 1.5 < got["0"].hi
    assert sum(r.n for r in got.values()) == sums.n == sums.mean("value").n


def test_a_position_outside_of_the_table_is_an_error():
    with pytest.raises(RunError, match=r"token position 9 is outside of the table.*0 to 3"):
        filled([1.0], [0], [9], n_pos=4)


@pytest.mark.parametrize("sign", [1, -1])
def test_quantiles_within_1_percent(sign):
    values = sign * np.exp(np.random.default_rng(1).normal(-6, 3, 20_000))
    sums = filled(values, np.zeros(20_000, int), histogram=("value",))
    for q in (0.05, 0.5, 0.95):
        exact = np.quantile(values, q)
        assert sums.quantile("value", q, "q").value == pytest.approx(exact, rel=0.01)


def test_quantiles_of_what_is_exactly_0_and_of_what_lies_beyond_the_edges():
    sums = filled(np.zeros(9), np.zeros(9, int), histogram=("value",))
    assert sums.quantile("value", 0.95, "p95").value == 0.0
    far = filled(np.array([-1e30, 1e-30, 1e30]), np.zeros(3, int), histogram=("value",))
    assert far.quantile("value", 0.5, "p50").value == 0.0
    assert far.largest("value").value == 1e30
    assert far.quantile("value", 0.0, "p0").value == pytest.approx(-1e6, rel=0.05)


def test_paired_difference_is_far_narrower_than_the_single_intervals():
    rng = np.random.default_rng(2)
    docs = np.arange(30).repeat(8)
    hard = rng.gamma(2, 1, 30)[docs]
    a, b = filled(hard + 0.1 + 0.01 * rng.normal(size=240), docs), filled(hard, docs)
    ours, theirs = (sums.per_document("value") for sums in (a, b))
    got = (ours - theirs).mean()
    assert got.n == 240
    assert got.value == pytest.approx(a.mean("value").value - b.mean("value").value, rel=1e-12)
    assert got.lo < got.value < got.hi and got.lo > 0.09
    wide = a.mean("value")
    assert got.hi - got.lo < 0.05 * (wide.hi - wide.lo)
    back = (theirs - ours).mean()
    assert (back.lo, back.hi) == pytest.approx((-got.hi, -got.lo))
    same = (ours - ours).mean()
    assert (same.value, same.lo, same.hi) == (0.0, 0.0, 0.0)


def test_paired_difference_of_other_tokens_is_an_error():
    with pytest.raises(RunError, match="the tokens behind a paired difference do not fit"):
        _ = filled([1.0, 2.0], [0, 1]).per_document("value") - filled(
            [1.0, 2.0], [0, 0], n_docs=2
        ).per_document("value")


def test_many_documents_share_blocks_and_keep_the_mean():
    n = 3 * MOST
    values = np.random.default_rng(0).normal(size=n)
    sums = filled(values, np.arange(n))
    assert sums.counts.shape == (MOST, 1)
    assert sums.mean("value").value == pytest.approx(values.mean(), rel=1e-12)


def test_minibatch_interval_is_over_documents():
    few = Both("cka_minibatch").update(*[batch(i, docs=[i] * 4) for i in range(3)])
    assert math.isnan(few.read()[0].lo)
    many = Both("cka_minibatch").update(*[batch(i, docs=[i] * 4) for i in range(12)])
    value, shift = many.read()
    assert value.lo < value.value < value.hi and value.over == shift.over == DOCUMENTS
    assert (shift.lo, shift.hi) == pytest.approx((1 - value.hi, 1 - value.lo))


@pytest.mark.parametrize("name", ["cka", "frechet", "gaussian_kl", "effective_rank"])
def test_moments_have_no_interval(name):
    for reading in Both(name).update(make(name, 1), make(name, 2)).read():
        assert math.isnan(reading.lo) and math.isnan(reading.hi)


def test_parts_of_another_run_do_not_merge_or_load():
    with pytest.raises(RunError, match="TokenSums do not fit"):
        TokenSums(4, 8).merge(TokenSums(5, 8))
    with pytest.raises(RunError, match=r"saved TokenSums\.counts do not fit"):
        TokenSums(4, 8).load(TokenSums(5, 8).state())
    with pytest.raises(RunError, match="the saved state holds nothing for 'kl'"):
        Both("kl").student.load({})
    with pytest.raises(RunError, match="parts of two runs do not fit"):
        Both("kl").student.merge(Both("js").student)
