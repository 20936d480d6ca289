"""The choice of layers: against trying every choice there is, and each refusal on its text."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mismatch.errors import UsageError
from mismatch.stages.plan.choose import Score, choose


def scores(seed, layers=7, mechanisms=("a", "b")):
    draw = np.random.default_rng(seed)
    return [
        Score(layer, name, float(draw.exponential()), float(draw.normal(0.2, 0.5)))
        for layer in range(layers)
        for name in mechanisms
    ]


def every(all_scores, count):
    for places in itertools.combinations(sorted({s.layer for s in all_scores}), count):
        options = [[s for s in all_scores if s.layer == place] for place in places]
        yield from itertools.product(*options)


def kl(chosen):
    return sum(s.kl for s in chosen)


def lost(chosen):
    return sum(max(s.lost, 0) for s in chosen)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget_lost", [None, 0.6])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_it_is_the_best_of_all_choices(seed, budget_lost, count):
    given = scores(seed)
    allowed = [
        kl(choice) for choice in every(given, count)
        if budget_lost is None or lost(choice) <= budget_lost
    ]  # fmt: skip
    if not allowed:
        with pytest.raises(UsageError, match="no choice of"):
            choose(given, count, budget_lost=budget_lost)
        return
    found = choose(given, count, budget_lost=budget_lost)
    assert kl(found) == pytest.approx(min(allowed), rel=1e-9)
    assert [s.layer for s in found] == sorted({s.layer for s in found})
    assert len(found) == count


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget_lost", [None, 0.4])
def test_as_many_as_the_budget_allows_then_as_cheap_as_possible(seed, budget_lost):
    given, budget = scores(seed, 5), 1.2
    fitting = [
        choice for count in range(1, 6) for choice in every(given, count)
        if kl(choice) <= budget and (budget_lost is None or lost(choice) <= budget_lost)
    ]  # fmt: skip
    found = choose(given, None, budget_kl=budget, budget_lost=budget_lost)
    most = max(map(len, fitting))
    assert len(found) == most
    assert kl(found) == pytest.approx(min(kl(c) for c in fitting if len(c) == most), rel=1e-9)


@pytest.mark.parametrize("size", [1e-5, 1e-9])
def test_small_costs_are_told_apart(size):
    """The tolerance of the solver is absolute."""
    given = [Score(s.layer, s.mechanism, size * s.kl) for s in scores(0)]
    budget = kl(given) / 4
    for count, limit in ((3, None), (3, budget), (None, budget)):
        found = choose(given, count, budget_kl=limit)
        choices = [kl(choice) for choice in every(given, len(found))]
        assert kl(found) == pytest.approx(min(choices), rel=1e-6)
        more = [kl(choice) for choice in every(given, len(found) + 1)]
        assert count is not None or not more or min(more) > budget


def test_one_price_without_measure_hides_no_other():
    """HALO divides by what the least layer costs beyond itself: nothing."""
    prices = np.random.default_rng(1).exponential(size=8).tolist()
    given = [Score(layer, "a", 1.0, cost=cost) for layer, cost in enumerate([1e10, *prices])]
    cheapest = {1 + at for at in np.argsort(prices)[:3].tolist()}
    for count in (3, None):
        assert {s.layer for s in choose(given, count, budget_kl=3.5)} == cheapest


def test_the_layer_that_carries_retrieval_is_left_alone():
    given = [Score(0, "a", 0.02), Score(1, "a", 0.01, 9.0), Score(2, "a", 0.3), Score(3, "a", 0.04)]
    assert [s.layer for s in choose(given, 2)] == [0, 1]
    assert [s.layer for s in choose(given, 2, budget_lost=0.5)] == [0, 3]


def test_a_gain_pays_for_no_loss():
    given = [Score(0, "a", 0.1, -5.0), Score(1, "a", 0.1, 0.6), Score(2, "a", 0.9, 0.0)]
    assert [s.layer for s in choose(given, 2, budget_lost=0.5)] == [0, 2]


@pytest.mark.parametrize(
    ("count", "budgets", "message"),
    [
        (
            5,
            {},
            "5 layers asked for, and 3 can hold a\n\n"
            "hint: take --layers 3 or fewer, or widen --among",
        ),
        (
            2,
            {"budget_kl": 0.2},
            "no choice of 2 layers stays within a KL of 0.200\n\nhint: for 2 layers the least KL is 0.300",
        ),
        (
            None,
            {"budget_kl": 0.05},
            "no choice of a layer stays within a KL of 0.0500\n\nhint: for 1 layer the least KL is 0.100",
        ),
        (
            3,
            {"budget_lost": 0.5},
            "no choice of 3 layers stays within a loss of the passkey of 0.500\n\n"
            "hint: for 3 layers without a budget of retrieval the passkey would lose 9.00",
        ),
        (
            3,
            {"budget_kl": 0.1, "budget_lost": 0.5},
            "no choice of 3 layers stays within a KL of 0.100 and a loss of the passkey of 0.500\n\n"
            "hint: for 3 layers without budgets the least KL is 0.600",
        ),
    ],
)
def test_what_cannot_be_chosen(count, budgets, message):
    given = [Score(0, "a", 0.1), Score(1, "a", 0.2), Score(2, "a", 0.3, 9.0)]
    with pytest.raises(UsageError) as caught:
        choose(given, count, **budgets)
    assert str(caught.value) == message


def test_nothing_to_choose_from():
    with pytest.raises(UsageError, match="1 layer asked for, and 0 can hold nothing"):
        choose([], 1)
