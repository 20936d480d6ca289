"""Findings: each rule speaks when its numbers say so, and is silent when they do not."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
from plans import replaced

from mismatch.runs.table import as_table
from mismatch.stages.trace.evidence import Evidence
from mismatch.stages.trace.findings import findings_of, worth_it

CLAUSES = (replaced("infini"),)


def row(metric, value, lo=None, hi=None, **where):
    base = {"mode": "free", "student": "swap", "layer": None, "site": "logits", "stat": "mean"}
    lo, hi = value if lo is None else lo, value if hi is None else hi
    return {
        **base,
        **where,
        "metric": metric,
        "value": value,
        "lo": lo,
        "hi": hi,
        "n": 100,
        "run_id": "r",
    }


def evidence(*rows: dict) -> Evidence:
    return Evidence(as_table(pd.DataFrame(rows)), (2,), 6, "toy", CLAUSES)


def titles(*rows: dict) -> list[str]:
    return [finding.title for finding in findings_of(evidence(*rows))]


def kl(swap, zero, lo, hi):
    return (
        row("kl", swap),
        row("kl", zero, student="zero"),
        row("kl", swap - zero, lo, hi, stat="mean_minus_zero"),
        row("kl", 0.0, student="floor"),
    )


@pytest.mark.parametrize(
    "numbers, title, severity",
    [
        ((0.08, 0.05, 0.02, 0.04), "worse than deleting the module", "high"),
        ((0.05, 0.05, -0.01, 0.01), "no better than deleting the module", "high"),
        ((0.04, 0.05, -0.02, -0.005), "80% of the damage of deleting the module", "high"),
        ((0.01, 0.05, -0.05, -0.03), "20% of the damage of deleting the module", "medium"),
        ((0.002, 0.05, -0.05, -0.04), "4% of the damage of deleting the module", "low"),
        ((0.0, 0.05, -0.05, -0.05), "no shift", "info"),
    ],
)
def test_the_verdict_rests_on_the_paired_difference(numbers, title, severity):
    finding = worth_it(evidence(*kl(*numbers)))
    assert (finding.title, finding.severity) == (title, severity)


def test_a_shift_at_the_floor_is_none():
    rows = (row("kl", 1e-7), row("kl", 2e-7, student="floor"), row("kl", 0.05, student="zero"))
    assert titles(*rows) == ["no shift"]


def test_without_an_interval_nothing_is_found():
    nothing = float("nan")
    finding = worth_it(evidence(*kl(0.0373, 0.0560, nothing, nothing)))
    assert (finding.severity, finding.title) == (
        "info",
        "the output shifts, and there is too little text to judge it",
    )
    assert finding.text.endswith(
        "deleting the module costs 0.056. Of the difference no interval: that takes 4 documents, or 8 windows of fewer."
    )


def test_without_controls_nothing_is_judged():
    assert titles(row("kl", 0.03)) == ["the output shifts"]


def test_the_next_command_keeps_the_teachers_module():
    finding = worth_it(evidence(*kl(0.08, 0.05, 0.02, 0.04)))
    assert (
        finding.next
        == 'mismatch trace --model toy --swap "layer2.attn:parallel(infini, alpha=0.1)"'
    )


def test_the_next_command_keeps_the_arguments():
    found = evidence(*kl(0.08, 0.05, 0.02, 0.04))
    swapped = dataclasses.replace(found, clauses=(replaced("infini", args={"segment": 64}),))
    assert "parallel(infini(segment=64), alpha=0.1)" in worth_it(swapped).next


NOTHING = float("nan")
FORCED = {"layer": 2, "site": "attn_out", "mode": "forced"}


@pytest.mark.parametrize(
    "numbers, title, severity",
    [
        ((1.4, 1.2, 1.6), "misses its target by more than its own size", "high"),
        ((1.1, 0.9, 1.3), "local error 110% of the update", "medium"),
        ((0.84, 0.8, 0.9), "local error 84% of the update", "medium"),
        ((0.35, 0.2, 0.5), "local error 35% of the update", "low"),
    ],
)
def test_local_error_is_as_bad_as_the_better_end_of_its_interval(numbers, title, severity):
    (found,) = findings_of(evidence(row("rel_l2", *numbers, **FORCED)))
    assert title in found.title and found.severity == severity
    assert f"{numbers[0]:.2f} [{numbers[1]:.2f}, {numbers[2]:.2f}]" in found.text


def test_no_local_error_is_no_finding():
    assert titles(row("rel_l2", 0.0, **FORCED)) == []


@pytest.mark.parametrize(
    "numbers, severity",
    [
        ((1.5, 1.2, 1.8), "medium"),
        ((-1.5, -1.8, -1.2), "medium"),
        ((1.0, 0.5, 1.5), "low"),
        ((0.5, 0.2, 0.8), None),
        ((-0.5, -1.1, 0.1), None),
        ((0.1, 0.05, 0.15), None),
    ],
)
def test_scale(numbers, severity):
    found = findings_of(evidence(row("norm_ratio", *numbers, **FORCED)))
    assert [f.severity for f in found] == ([severity] if severity else [])
    if severity:
        assert f"{2 ** numbers[0]:.2f} times its size" in found[0].title


@pytest.mark.parametrize(
    "growth, said",
    [
        ((4.0, 2.5, 6.0), ("grows", "medium")),
        ((4.0, 1.5, 9.0), ("grows", "info")),
        ((0.5, 0.3, 0.8), ("heals", "info")),
        ((1.05, 1.02, 1.08), ("stays", "info")),
        ((1.0, 0.9, 1.1), ("stays", "info")),
        ((1.4, 0.9, 2.2), None),
    ],
)
def test_depth(growth, said):
    rows = (
        row("rel_l2", 0.1, layer=2, site="resid_post"),
        row("rel_l2", 0.1 * growth[0], layer=5, site="resid_post"),
        row("rel_l2", *growth, layer=5, site="resid_post", stat="growth"),
    )
    found = [(f.title, f.severity) for f in findings_of(evidence(*rows))]
    assert found == ([(f"the shift {said[0]} behind the swap", said[1])] if said else [])


def test_without_intervals_the_update_is_not_judged_and_that_is_said():
    rows = (
        row("rel_l2", 1.4, NOTHING, NOTHING, **FORCED),
        row("norm_ratio", 2.0, NOTHING, NOTHING, **FORCED),
        row("rel_l2", 0.1, NOTHING, NOTHING, layer=2, site="resid_post"),
        row("rel_l2", 0.4, NOTHING, NOTHING, layer=5, site="resid_post"),
        row("rel_l2", 4.0, NOTHING, NOTHING, layer=5, site="resid_post", stat="growth"),
        row("update_size", 0.6, NOTHING, NOTHING, layer=2, site="attn_out", stat="teacher"),
    )
    (found,) = findings_of(evidence(*rows))
    assert found.title == "there is too little text to judge the update"
    assert "no interval: that takes 4 documents" in found.text
    assert titles(rows[0], row("norm_ratio", 0.01, 0.0, 0.02, **FORCED)) == []


def profile(swap, zero=(0.3, 0.3, 0.3, 0.3), half=0.001):
    """Rows at positions 0, 1-15, 64-127 and 512-1023, the first two within a segment of 64."""
    found = []
    for position, ours, theirs in zip(("0", "1-15", "64-127", "512-1023"), swap, zero, strict=True):
        found.append(row("kl", ours, ours - half, ours + half, position=position))
        found.append(row("kl", theirs, position=position, student="zero"))
    return found


SEGMENT = (replaced("infini", args={"segment": 64}),)


@pytest.mark.parametrize(
    "numbers, said",
    [
        ({"swap": (0.0, 0.05, 0.05, 0.15)}, "late tokens suffer more"),
        # The local part holds every token of the first segment: no loss there says nothing.
        ({"swap": (0.0, 0.0, 0.15, 0.15)}, None),
        # Deleting the module hurts late tokens as much more.
        ({"swap": (0.0, 0.05, 0.05, 0.15), "zero": (0.0, 0.1, 0.1, 0.3)}, None),
        # Apart, and of no weight: a thousandth beside 0.3.
        ({"swap": (0.0, 0.0, 0.0001, 0.001), "half": 1e-6}, None),
        ({"swap": (0.0, 0.05, 0.14, 0.15), "half": 0.02}, None),
        ({"swap": (0.0, 0.15, 0.05, 0.05)}, "early tokens suffer more"),
        # So does deleting it.
        ({"swap": (0.0, 0.15, 0.05, 0.05), "zero": (0.3, 0.9, 0.3, 0.3)}, None),
    ],
)
def test_late_tokens_are_judged_beyond_the_reach_and_against_deleting(numbers, said):
    found = dataclasses.replace(evidence(*profile(**numbers)), clauses=SEGMENT)
    titles_ = [finding.title for finding in findings_of(found)]
    assert titles_ == ([said] if said else [])


def test_without_deleting_nothing_is_said_of_late_tokens():
    rows = [r for r in profile((0.0, 0.05, 0.05, 0.15)) if r["student"] == "swap"]
    assert titles(*rows) == []


def test_premise():
    where = {"layer": 2, "site": "attn_out", "stat": "teacher"}
    (found,) = findings_of(evidence(row("update_size", 0.6, 0.5, 0.7, **where)))
    assert found.title == "layer 2 is not a small correction" and "0.60 [0.50, 0.70]" in found.text
    assert titles(row("update_size", 0.35, 0.25, 0.45, **where)) == []
    assert titles(row("update_size", 0.15, **where)) == []
