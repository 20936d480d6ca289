"""From answers to rows: means, paired differences, intervals, and what does not apply."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mismatch.metrics.sums.per_document import PerDocument, Units
from mismatch.probes.base import TEACHER, Measure, minus, rows
from mismatch.runs.table import as_table, conditions, under

SWAPPED = {"swap": frozenset({3}), "zero": frozenset({3})}


def answers():
    draw = np.random.default_rng(0)
    teacher, swap, zero = (draw.normal(size=6) for _ in range(3))
    return {
        TEACHER: [Measure.mean("x", teacher), Measure.mean(under("y", a=1), teacher, layer=3)],
        "swap": [Measure.mean("x", swap), Measure.mean(under("y", a=1), swap, layer=3)],
        "zero": [Measure.mean("x", zero), Measure.absent(under("y", a=1), layer=3)],
    }


def test_rows():
    given = answers()
    table = as_table([row | {"run_id": "r"} for row in rows("p", given, SWAPPED)])
    got = {(r.student, r.stat): r for r in table.itertuples()}
    assert set(got) == {
        *((name, "x") for name in given),
        *((name, "y[a=1]") for name in given),
        ("swap", "x_minus_teacher"),
        ("swap", "x_minus_zero"),
        ("zero", "x_minus_teacher"),
        ("swap", "y_minus_teacher[a=1]"),
    }
    teacher, swap = (given[name][0].top for name in (TEACHER, "swap"))
    assert got["swap", "x"].value == pytest.approx(swap.mean(), rel=1e-12)
    row = got["swap", "x_minus_teacher"]
    assert row.value == pytest.approx((swap - teacher).mean(), rel=1e-12)
    paired = PerDocument(swap - teacher, np.ones(6)).mean()  # the same samples on both sides
    assert (row.lo, row.hi) == pytest.approx((paired.lo, paired.hi), rel=1e-9)
    assert row.over == "samples"
    assert got["swap", "y[a=1]"].swapped and not got["swap", "x"].swapped
    assert not got[TEACHER, "y[a=1]"].swapped
    nothing = got["zero", "y[a=1]"]
    assert math.isnan(nothing.value) and nothing.n == 0


@pytest.mark.parametrize(
    "probe, stat, side", [("induction", "nll_second", 1), ("passkey", "logprob[length=64]", -1)]
)
def test_a_headline_of_one_sign_has_an_interval_of_one_sign(probe, stat, side):
    few = side * np.array([0.01, 0.02, 0.02, 3.0])
    given = {TEACHER: [Measure.mean(stat, few)], "swap": [Measure.mean(stat, few * 2)]}
    one = rows(probe, given, {})[0]
    assert one["value"] == pytest.approx(few.mean())
    low, high = sorted((side * one["lo"], side * one["hi"]))
    assert 0 <= low < abs(one["value"]) < high
    assert {r["stat"] for r in rows(probe, given, {}) if r["lo"] < 0 < r["hi"]} == {
        minus(stat, TEACHER)
    }


def test_windows_of_text_count_by_document_or_in_blocks():
    """Eight windows of four documents are four units; eight of one document stand in blocks."""
    given = {
        TEACHER: [],
        "swap": [Measure.mean("x", np.arange(8.0)), Measure.mean("y", [1.0, 2.0])],
    }
    by_document, other = rows("p", given, SWAPPED, Units.by(np.arange(8) % 4))
    four = PerDocument(np.array([4.0, 6.0, 8.0, 10.0]), np.full(4, 2)).mean()
    assert [by_document[k] for k in ("value", "lo", "hi", "over")] == [*four[:3], "documents"]
    assert other["over"] == "" and math.isnan(other["lo"])  # two samples that are no windows
    in_blocks, _ = rows("p", given, SWAPPED, Units.by(np.zeros(8, int)))
    assert in_blocks["over"] == "moving blocks of windows" and in_blocks["value"] == 3.5
    few = {TEACHER: [], "swap": [Measure.mean("x", np.arange(6.0))]}
    assert math.isnan(rows("p", few, SWAPPED, Units.by(np.zeros(6, int)))[0]["lo"])


def test_a_ratio_is_of_sums_and_leaves_samples_out():
    measure = Measure("r", np.array([1.0, 2.0, 0.0]), np.array([2.0, 2.0, 0.0]), 4)
    assert measure.value() == 3 / 4
    assert math.isnan(Measure("r", np.zeros(2), np.zeros(2), 0).value())


def test_a_single_number_has_no_interval():
    found = rows("p", {TEACHER: [], "swap": [Measure.number("gate", 0.5, 1, head=2)]}, SWAPPED)
    assert found[0]["value"] == 0.5 and math.isnan(found[0]["lo"]) and found[0]["head"] == 2


@pytest.mark.parametrize(
    ("stat", "given"),
    [("x", {}), ("logprob", {"length": 256.0, "depth": 0.1}), ("kl", {"without": "memory"})],
)
def test_conditions_there_and_back(stat, given):
    assert conditions(under(stat, **given)) == (stat, given)
    assert conditions(minus(under(stat, **given), "zero")) == (f"{stat}_minus_zero", given)
