"""Intervals over documents, position bins, quantiles, and the paired difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from generator import Both, batch, make

from mismatch.errors import RunError
from mismatch.metrics.base import Kept, PerDocument, TokenSums
from mismatch.metrics.sums.per_document import RESAMPLES, interval, resamples
from mismatch.metrics.sums.tokens import MAX_BLOCKS, bin_names


def filled(values, docs, positions=None, *, n_docs=None, n_pos=1, **options):
    values, docs = torch.as_tensor(values), torch.as_tensor(docs)
    positions = torch.zeros_like(docs) if positions is None else torch.as_tensor(positions)
    sums = TokenSums(n_docs or int(docs.max()) + 1, n_pos, **options)
    sums.update({"value": values}, Kept.of(torch.ones_like(docs).bool(), docs, positions))
    return sums


def mean_of(sums, counts, seed=0):
    return PerDocument(sums, counts).mean(seed)


def test_same_seed_same_interval_other_seed_another():
    rng = np.random.default_rng(0)
    sums, counts = rng.normal(size=20), np.full(20, 5)
    assert mean_of(sums, counts, 1) == mean_of(sums, counts, 1)
    assert mean_of(sums, counts, 1)[1:3] != mean_of(sums, counts, 2)[1:3]


def test_resamples_draw_as_many_documents_as_there_are():
    weights = resamples(7)
    assert weights.shape == (RESAMPLES, 7)
    assert (weights.sum(1) == 7).all()


def test_interval_covers_the_true_mean_as_often_as_it_says():
    """Documents of unequal length whose tokens share an offset: token-wise intervals would fail."""
    rng = np.random.default_rng(5)
    trials, docs, hits, token_hits = 300, 40, 0, 0
    for _ in range(trials):
        counts = rng.integers(5, 60, docs)
        sums = counts * rng.normal(1.0, 0.5, docs)
        value, lo, hi, n = mean_of(sums, counts, seed=0)
        hits += lo <= 1.0 <= hi
        half = 1.96 * 0.5 / math.sqrt(n)
        token_hits += value - half <= 1.0 <= value + half
    assert 0.89 <= hits / trials <= 0.98
    assert token_hits / trials < 0.5


def test_interval_equals_a_loop_over_resampled_documents():
    """The same bootstrap written out: draw documents, pool their tokens, average."""
    rng = np.random.default_rng(3)
    docs = [rng.normal(i % 3, 1, 4 + i) for i in range(12)]
    sums, counts = np.array([d.sum() for d in docs]), np.array([len(d) for d in docs])
    _, lo, hi, _ = mean_of(sums, counts)
    means = [np.concatenate([docs[i] for i in rng.integers(0, 12, 12)]).mean() for _ in range(4000)]
    assert (lo, hi) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.08)


def test_documents_without_tokens_take_no_part():
    sums, counts = np.array([1.0, 0.0, 5.0, 0.0]), np.array([2, 0, 2, 0])
    value, lo, hi, n = mean_of(sums, counts)
    assert (value, n) == (1.5, 4)
    assert 0.5 <= lo < value < hi <= 2.5


@pytest.mark.parametrize("docs", [0, 1])
def test_too_few_documents_have_no_interval(docs):
    _value, lo, hi, n = mean_of(np.ones(docs), np.ones(docs, int))
    assert math.isnan(lo) and math.isnan(hi) and n == docs


def test_interval_of_mostly_undefined_draws_is_nan():
    assert all(map(math.isnan, interval(np.array([1.0, math.nan, math.nan]))))


def test_position_bins():
    assert bin_names(300) == ["0", "1-3", "4-15", "16-63", "64-127", "128-255", "256-299"]
    assert bin_names(1) == ["0"]
    assert bin_names(512)[-1] == "256-511" and bin_names(513)[-1] == "512"


def test_by_position_means_are_those_of_the_bins():
    n_pos = 70
    positions = torch.arange(n_pos).repeat(3)
    docs = torch.arange(3).repeat_interleave(n_pos)
    values = positions.double() + docs
    sums = filled(values, docs, positions, n_pos=n_pos, by_position=True)
    got = {r.position: r for r in sums.by_position("value")}
    assert got["16-63"].value == pytest.approx(np.arange(16, 64).mean() + 1)
    assert got["64-69"].n == 3 * 6
    assert got["0"].lo >= 0.0 and got["0"].hi <= 2.0
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
    n = 3 * MAX_BLOCKS
    values = np.random.default_rng(0).normal(size=n)
    sums = filled(values, np.arange(n))
    assert sums.counts.shape == (MAX_BLOCKS, 1)
    assert sums.mean("value").value == pytest.approx(values.mean(), rel=1e-12)


def test_minibatch_interval_resamples_documents():
    alone = Both("cka_minibatch").update(batch(0, docs=[0, 0, 0, 0]))
    assert math.isnan(alone.read()[0].lo)
    many = Both("cka_minibatch").update(*[batch(i, docs=[i] * 4) for i in range(12)])
    value, shift = many.read()
    assert value.lo < value.value < value.hi
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
