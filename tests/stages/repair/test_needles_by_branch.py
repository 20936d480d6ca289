"""What each branch alone retrieves: needles beyond the local part, before the repair and after it."""

from __future__ import annotations

import pytest
from asking import LENGTH, setting, student
from random_models import build

from mismatch.models.layout import Layout
from mismatch.probes.base import Subject
from mismatch.probes.needles import Needles
from mismatch.runs.table import as_table
from mismatch.stages.repair.before_after import REPAIRED
from mismatch.stages.repair.knockout import beyond, needle_rows
from mismatch.stages.repair.ladder_stages.module_pair import pairs_of
from mismatch.stages.repair.report.needles_by_branch import (
    needle_lines,
    needle_section,
    needles_by_branch,
)

SWAP = "layer1:infini(segment=16)"


@pytest.fixture(scope="module")
def asked():
    """A swap and one of another seed in the place of the repaired model."""
    model, probe = build("llama"), Needles(setting(depths=(0.0, 1.0)))
    swap, repaired = student(model, SWAP), student(model, SWAP, REPAIRED, seed=1)
    parts = pairs_of(Layout.of(model), repaired)
    return model, probe, swap, repaired, parts


def found(asked, reach=16):
    model, probe, swap, repaired, parts = asked
    return needle_rows(probe, Layout.of(model), [swap, repaired], parts, reach)


def test_a_needle_at_the_end_is_not_beyond_the_local_part(asked):
    early, late = asked[1].cells.values()
    assert beyond(early, 16) and not beyond(late, LENGTH // 2) and not beyond(early, LENGTH)


def test_all_branches_read_what_the_probe_reads_and_none_nothing_of_them(asked):
    model, probe, swap, repaired, _ = asked
    local = LENGTH // 2  # the early needles alone
    rows = {(r["student"], r["stat"]): r["value"] for r in found(asked, local)}
    kept = {stat.partition("kept=")[2][:-1] for _, stat in rows}
    assert kept == {"all", "memory", "local", "none"}
    subjects = [Subject.teacher(Layout.of(model)), Subject.of(swap), Subject.of(repaired)]
    for name, measures in probe.run(subjects).items():
        early = next(m for m in measures if m.stat == f"logprob[length={LENGTH},depth=0]")
        assert rows[name, "logprob[kept=all]"] == pytest.approx(early.value())
    of_teacher = {rows["teacher", f"logprob[kept={name}]"] for name in kept}
    assert len(of_teacher) == 1
    of_swap = {rows["swap", f"logprob[kept={name}]"] for name in kept}
    assert len(of_swap) == 4  # each branch counts in a model of random weights
    zero = student(model, "layer1:zero")  # an attention without any branch adds nothing
    read = probe.run([subjects[0], Subject.of(zero)])["swap"]
    early = next(m for m in read if m.stat == f"logprob[length={LENGTH},depth=0]")
    assert rows["swap", "logprob[kept=none]"] == pytest.approx(early.value(), abs=1e-4)


def test_nothing_is_asked_without_branches_or_far_needles(asked):
    model, probe, *_ = asked
    assert not found(asked, reach=LENGTH)
    other = student(model, "layer1:nope")
    pair = pairs_of(Layout.of(model), other)
    assert not needle_rows(probe, Layout.of(model), [other], pair, 16)


def test_the_report_has_both_and_the_headlines_do_not(asked):
    rows = [
        {**row, "run_id": "test", "student": "swap", "stage": "repair"}
        if row["student"] == REPAIRED
        else {**row, "run_id": "test"}
        for row in found(asked)
    ]
    table = as_table(rows)
    read = needles_by_branch(table)
    assert list(dict.fromkeys(read["kept"])) == ["all", "local", "memory", "none"]
    assert set(read["stage"]) == {"surgery", "repair"}
    (line,) = needle_lines(table)
    assert "all " in line and " -> " in line and "none " in line
    assert "repaired − teacher" in str(needle_section(table))
    assert not needle_lines(table[table["stat"] == "logprob"])
