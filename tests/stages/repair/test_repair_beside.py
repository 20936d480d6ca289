"""Beside the ladder: branches taken out, the shift before and after, probes of teacher, swap and repaired model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from killed_repair import SETTINGS, SWAP
from measured import cut, student_of
from wonderland import documents

import mismatch
from mismatch.errors import ConfigError, UsageError
from mismatch.forward.heldout import Evaluated, HeldOut
from mismatch.metrics.base import PerDocument
from mismatch.models.layout import Layout
from mismatch.runs.table import as_table
from mismatch.stages.opening import Opened
from mismatch.stages.repair import before_after as questions
from mismatch.stages.repair import knockout
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.knockout import MATTERS, knocked_out, verdict
from mismatch.stages.repair.ladder_stages.module_pair import pairs_of
from mismatch.stages.repair.ladder_stages.stage_result import StageResult
from mismatch.stages.repair.plan import Gates, RepairPlan, StudentReading
from mismatch.stages.repair.report.before_after_figure import before_after, before_after_data
from mismatch.stages.repair.report.curve_figure import branch_line
from mismatch.stages.repair.report.page import lost, repair_verdict, warnings
from mismatch.stages.repair.rows import branch_rows, stage_rows, student_rows
from mismatch.stages.repair.texts import read_texts
from mismatch.surgery.operate import Student
from mismatch.surgery.students import Teacher
from mismatch.texts.windows import Windows

INFINI = "layer1:infini(segment=8)"


def kl_by_document(teacher, student, windows: Windows) -> np.ndarray:
    """Sum of KL(teacher || student) of each document, in float64, from the whole logits of both models."""
    ids = torch.from_numpy(windows.ids)
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (teacher, student))
    kl = (p.exp() * (p - q)).sum(-1).sum(-1).numpy()
    return np.bincount(windows.doc, kl, windows.n_docs)


def evaluated(
    model, student: Student, windows: Windows, first: int = 1
) -> tuple[HeldOut, Evaluated]:
    held_out = HeldOut(Layout.of(model), windows, first, 2)
    return held_out, held_out.evaluate(student.layout)


# ---- branches -----------------------------------------------------------------------------------


def test_a_branch_taken_out_is_the_model_without_it_and_its_growth_is_paired(tiny):
    model, windows = tiny("llama"), cut(12)
    student = student_of(model, INFINI)
    held_out, whole = evaluated(model, student, windows)
    found = knocked_out(held_out, student, pairs_of(Layout.of(model), student), whole)
    assert [at.branch for at in found] == ["memory", "local"]
    part = student.model.get_submodule(student.plan.clauses[0].path)
    before = kl_by_document(model, student.model, windows)
    for at in found:
        part.silent = frozenset({at.branch})
        without = kl_by_document(model, student.model, windows)
        part.silent = frozenset()
        assert at.kl == pytest.approx(without.sum() / windows.tokens, rel=1e-4)
        assert at.more == pytest.approx((without - before).sum() / windows.tokens, rel=1e-3)
        # The documents are equally long: of four numbers, 3.182 standard errors with 3 in place of 4.
        each = (without - before) / (3 * windows.seq_len)
        reach = 3.182446 * each.std(ddof=1) / math.sqrt(3)
        assert (at.more_lo, at.more_hi) == pytest.approx(
            (at.more - reach, at.more + reach), rel=1e-2
        )
    assert part.silent == frozenset()


def test_a_branch_whose_gate_is_shut_is_bypassed_and_the_other_is_used(tiny):
    model = tiny("llama")
    student = student_of(model, "layer1:infini(segment=8, gate_init=-60)")
    held_out, whole = evaluated(model, student, cut(12))
    memory, local = knocked_out(held_out, student, pairs_of(Layout.of(model), student), whole)
    assert (memory.more, memory.more_lo, memory.more_hi) == (0.0, 0.0, 0.0)
    assert memory.verdict == "bypassed"
    assert local.verdict == "used"
    said = branch_line(memory, whole.kl.mean().value)
    assert "layer1.attn without its memory: KL" in said
    assert said.endswith("repaired by bypass, the memory branch is not used")


def test_branches_of_what_a_wrapper_holds_are_found(tiny):
    model = tiny("llama")
    student = student_of(model, f"layer1:parallel({INFINI.partition(':')[2]}, alpha=0.5)")
    held_out, whole = evaluated(model, student, cut())
    found = knocked_out(held_out, student, pairs_of(Layout.of(model), student), whole)
    assert [at.branch for at in found] == ["memory", "local"]
    assert all(at.more != 0 for at in found)


def test_of_many_parts_a_branch_is_taken_out_of_all_at_once(tiny, monkeypatch):
    model, windows = tiny("llama"), cut(12)
    student = student_of(model, "all:infini(segment=8)")
    held_out, whole = evaluated(model, student, windows, first=0)
    parts = pairs_of(Layout.of(model), student)
    apart = knocked_out(held_out, student, parts, whole)
    assert [at.where for at in apart[::2]] == [part.where for part in parts]
    monkeypatch.setattr(knockout, "ONE_BY_ONE", len(parts) - 1)
    found = knocked_out(held_out, student, parts, whole)
    where = f"all {len(parts)} modules"
    assert [(at.where, at.branch) for at in found] == [(where, "memory"), (where, "local")]
    swapped = [student.model.get_submodule(clause.path) for clause in student.plan.clauses]
    for at in found:
        for part in swapped:
            part.silent = frozenset({at.branch})
        without = kl_by_document(model, student.model, windows)
        for part in swapped:
            part.silent = frozenset()
        assert at.kl == pytest.approx(without.sum() / windows.tokens, rel=1e-4)
    assert f"{where} without its memory: KL" in branch_line(found[0], whole.kl.mean().value)


def test_a_mechanism_without_branches_is_not_applicable_and_not_0(tiny):
    model = tiny("llama")
    student = student_of(model, "layer1:nope")
    held_out, whole = evaluated(model, student, cut())
    (at,) = knocked_out(held_out, student, pairs_of(Layout.of(model), student), whole)
    assert at.branch is None and at.verdict == "not applicable" and math.isnan(at.kl)
    assert branch_line(at, 0.1) == ("layer1.rope: branches not applicable, the mechanism has none")
    rows = as_table([r | {"run_id": "test"} for r in branch_rows([at], 100, "documents")])
    assert rows["value"].isna().all() and (rows["n"] == 0).all()


@pytest.mark.parametrize(
    "more, said",
    [
        ((0.05, 0.02, 0.08), "used"),
        ((0.005, -0.001, 0.009), "bypassed"),
        ((-0.02, -0.03, -0.01), "bypassed"),
        ((0.02, 0.005, 0.04), "open"),
        ((0.02, math.nan, math.nan), "open"),  # no interval
    ],
)
def test_a_verdict_needs_the_whole_interval(more, said):
    assert verdict(more, MATTERS * 0.1) == said


# ---- held-out text ------------------------------------------------------------------------------


def test_the_difference_of_two_students_is_paired_over_documents(tiny):
    model, windows = tiny("llama"), cut(12)
    one, other = (
        evaluated(model, student_of(model, text), windows)[1] for text in (INFINI, "layer1:nope")
    )
    assert (one.kl - one.kl).mean()[:3] == (0.0, 0.0, 0.0)
    value, lo, hi, n, over = (one.kl - other.kl).mean()
    assert n == windows.tokens and over == "documents"
    assert value == pytest.approx(one.kl.mean().value - other.kl.mean().value)
    assert lo <= value <= hi
    back = (other.kl - one.kl).mean()
    assert back[:3] == pytest.approx((-value, -hi, -lo))
    alone = PerDocument(one.kl.sums[:1], one.kl.counts[:1])
    assert np.isnan((alone - alone).mean()[1:3]).all()


def test_rows_say_who_and_when(tiny):
    model, windows = tiny("llama"), cut()
    held_out, swap = evaluated(model, student_of(model, INFINI), windows)
    zero = held_out.evaluate(student_of(model, "layer1:zero").layout)
    half = Evaluated(*(PerDocument(found.sums / 2, found.counts) for found in (swap.kl, swap.nll)))
    students = {"swap": swap, "repaired": half, "zero": zero}
    stages = [
        StageResult("swap", kl=0.2, gap_closed=0.0),
        StageResult("local", kl=0.1, gap_closed=0.5),
    ]
    rows = [*stage_rows(stages, windows.tokens, "documents"), *student_rows(students)]
    found = as_table([row | {"run_id": "test"} for row in rows])
    value = found.set_index(["stage", "student", "metric", "stat"])["value"].to_dict()
    assert value["surgery", "swap", "kl", "mean"] == pytest.approx(swap.kl.mean().value)
    assert value["repair", "swap", "kl", "mean"] == pytest.approx(swap.kl.mean().value / 2)
    assert value["repair", "swap", "kl", "mean_minus_zero"] == pytest.approx(
        half.kl.mean().value - zero.kl.mean().value
    )
    assert value["repair", "swap", "kl", "gap_closed[after=local]"] == 0.5
    assert (found["n"] > 0).all()


# ---- the shift before and after -----------------------------------------------------------------


def shifts(model, swap: Student, repaired: Student, windows: Windows) -> pd.DataFrame:
    teacher = Teacher(model, None, Layout.of(model), None)  # type: ignore[arg-type]
    rows = questions.shift_rows(teacher, swap, repaired, windows, batch_size=2, seed=0)
    return as_table([row | {"run_id": "test"} for row in rows])


def of_stage(table: pd.DataFrame, stage: str) -> pd.DataFrame:
    rows = table[(table["student"] == "swap") & (table["stage"] == stage)]
    return rows.drop(columns="stage").reset_index(drop=True)


def test_nothing_trained_reads_the_same_before_and_after(tiny):
    model = tiny("llama")
    table = shifts(model, student_of(model, INFINI), student_of(model, INFINI), cut())
    before = of_stage(table, "surgery")
    before = before[before["stat"] != "growth"].reset_index(drop=True)  # a finding of the swap
    pd.testing.assert_frame_equal(before, of_stage(table, "repair"))


def test_the_shift_after_is_that_of_the_learner_and_its_neighbours_are_not_swapped(tiny):
    model, windows = tiny("llama"), cut()
    swap = student_of(model, INFINI)
    repaired = student_of(model, f"{INFINI}; layer2.mlp:lora(r=2)")
    _, lora = repaired.plan.clauses
    with torch.no_grad():
        for name in lora.new_parameters:
            repaired.model.get_submodule(lora.path).get_parameter(name).add_(0.1)
    table = shifts(model, swap, repaired, windows)
    ids = torch.from_numpy(windows.ids)
    states: dict[str, torch.Tensor] = {}
    for name, module in (("teacher", model), ("surgery", swap.model), ("repair", repaired.model)):
        with torch.no_grad():
            states[name] = module.model(ids).last_hidden_state.double()
    for stage in ("surgery", "repair"):
        rows = of_stage(table, stage)
        shown = rows[(rows.site == "final") & (rows.metric == "rel_l2") & (rows.stat == "mean")]
        distance = (states[stage] - states["teacher"]).norm(dim=-1)
        relative = distance / states["teacher"].norm(dim=-1)
        assert shown["value"].iloc[0] == pytest.approx(relative.mean().item(), rel=1e-4)
        assert set(rows.loc[rows["swapped"], "layer"]) == {1}
    assert not of_stage(table, "surgery").equals(of_stage(table, "repair"))


def test_one_scale_for_both_panels(tiny, monkeypatch):
    model = tiny("llama")
    table = shifts(model, student_of(model, INFINI), student_of(model, "layer1:identity"), cut())
    norms: list[Any] = []
    from mismatch.report import heatmap

    draw = heatmap.draw_panel

    def noted(ax, cells, quantity, norm, *rest):
        norms.append((quantity.metric, norm.vmin, norm.vmax))
        draw(ax, cells, quantity, norm, *rest)

    monkeypatch.setattr(heatmap, "draw_panel", noted)
    before_after(table)
    assert [metric for metric, *_ in norms] == ["rel_l2", "rel_l2", "norm_ratio", "norm_ratio"]
    assert norms[0] == norms[1] and norms[2] == norms[3]
    data = before_after_data(table)
    after = data[(data["stage"] == "repair") & (data["metric"] == "rel_l2")]
    assert (after["kind"] == "zero").all()  # an identity is the teacher, to the bit
    with pytest.raises(UsageError, match="not traced before and after"):
        before_after(table[table["stage"] == "surgery"])


def test_few_windows_keep_their_documents():
    windows = cut(6)
    some = questions.few(windows, 2 * windows.seq_len)
    assert some.tokens == 2 * windows.seq_len
    assert some.names == windows.names[:2] and some.n_docs == 2
    assert len(questions.few(windows, 1)) == 1


# ---- probes -------------------------------------------------------------------------------------


def config_of(**settings: Any) -> RepairConfig:
    return RepairConfig(model="glassllm", swap=(SWAP,), **(SETTINGS | settings))


def asked(teacher: Teacher, **settings: Any) -> Any:
    """What a repair would ask, and what it would not, of text that is given."""
    texts = {"data": documents(12), "train_data": documents(8, seed=1)}
    opened = Opened(config_of(**settings), teacher=teacher, given=texts)
    return questions.asked(opened, read_texts(opened))


def test_usual_probes_that_the_model_cannot_be_asked_are_left_out_and_named(toy_teacher):
    found, notes = asked(toy_teacher, probes=None)
    assert list(found.probes) == ["induction", "generation"]
    assert [note.split(" is longer")[0] for note in notes] == [
        "the probe passkey is not asked: a passkey prompt of 256 tokens",
        "the probe needles is not asked: a prompt of needles of 256 tokens",
        "the probe kv_lookup is not asked: a prompt of kv_lookup of 328 tokens",
    ]
    with pytest.raises(UsageError, match="a passkey prompt of 256 tokens is longer"):
        asked(toy_teacher, probes=("passkey",))
    assert asked(toy_teacher, probes=()) == (None, [])
    with pytest.raises(ConfigError, match="unknown probe `passkye`"):
        config_of(probes=("passkye",))


def test_a_repair_asks_teacher_swap_and_repaired_model(toy_teacher):
    """The swap that is asked afterwards is the one that was swapped, whatever the learner became."""
    texts = {"data": documents(12), "train_data": documents(8, seed=1)}
    given = SETTINGS | {
        "stages": ("closed-form", "local"),
        "trace_tokens": 96,
        "probes": ("induction",),
    }
    result = mismatch.repair(toy_teacher, SWAP, **given, **texts)
    alone = mismatch.probe(
        toy_teacher,
        mismatch.swap(toy_teacher, SWAP),
        probes=("induction",),
        samples=questions.SAMPLES,
        seq_len=48,
        controls=(),
    )
    put = result.table[result.table["metric"] == "induction"]
    for student, stage in (("teacher", "surgery"), ("swap", "surgery")):
        mine = put[(put["student"] == student) & (put["stage"] == stage)]
        ours = alone.table[alone.table["student"] == student]
        value = dict(zip(mine["stat"], mine["value"], strict=True))
        assert dict(zip(ours["stat"], ours["value"], strict=True)).items() <= value.items()
    after = put[(put["student"] == "swap") & (put["stage"] == "repair")]
    assert {"nll_second", "nll_second_minus_teacher"} <= set(after["stat"])
    swap = put[(put["student"] == "swap") & (put["stage"] == "surgery")]
    assert "nll_second_minus_repaired" in set(swap["stat"])
    assert result.plan.stages[0].kl == result.plan.students["swap"].kl[0]
    assert set(result.table["stage"]) == {"surgery", "repair"}
    assert "teacher -> swap -> repaired" in result.summary()
    assert "without its memory" in result.summary()


def having_closed(*gap: float) -> RepairPlan:
    """The plan of a repair that closed this share of the gap, with its interval."""
    nothing = (0.0, 0.0, 0.0)
    return RepairPlan(
        spec=SWAP, clauses=(), stages=(), branches=(), gates=Gates(), notes=(), teacher={},
        students={"repaired": StudentReading(nothing, nothing, gap, nothing)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "lo", "hi", "is_lost"),
    [
        ("passkey", -2.0, -1.0, True),
        ("passkey", 0.01, 0.02, False),  # found better than by the teacher
        ("induction", 1.0, 2.0, True),
        ("induction", -2.0, -1.0, False),
        ("generation", -2.0, -1.0, True),
        ("generation", 1.0, 2.0, True),
        ("passkey", -1.0, 1.0, False),
        ("passkey", float("nan"), float("nan"), False),
    ],
)
def test_a_gain_is_no_loss(metric, lo, hi, is_lost):
    assert lost(metric, lo, hi) is is_lost


def test_a_repair_of_text_that_leaves_retrieval_lost_is_warned_of_once_a_probe():
    def row(metric, stat, left, back, lo, hi, swap=-8.0):
        return {
            "metric": metric, "stat": stat, "unit": "", "teacher": -0.1, "swap": swap, "repaired": -0.1 + left,
            "left": left, "left_lo": lo, "left_hi": hi, "back": back,
        }  # fmt: skip

    rows = [
        row("passkey", "logprob", -4.0, 0.5, -5.0, -3.0),
        row("passkey", "logprob[segments=3]", -6.0, 0.2, -7.0, -5.0),
        row("induction", "nll_second", 0.1, 0.4, -0.1, 0.3, swap=0.3),  # may be nothing
        row("generation", "agreed", -7.0, 0.1, -7.5, -6.5),  # quality, not retrieval
    ]
    closed = having_closed(0.8, 0.7, 0.9)
    (said,) = warnings(pd.DataFrame(rows), closed)
    assert said.startswith(
        "80 % of the KL gap is closed, and 20 % of what passkey logprob[segments=3] lost is recovered"
    )
    assert warnings(pd.DataFrame(rows[2:]), closed) == []
    assert warnings(pd.DataFrame(rows), having_closed(0.2, 0.1, 0.3)) == []


@pytest.mark.parametrize(
    ("metric", "swap", "repaired", "left", "worse"),
    [
        ("generation", 42.6, 24.5, (-35.0, -12.0), True),  # KL better, and sooner another text
        ("generation", 42.6, 24.5, (-45.0, -2.0), False),  # may be as far as the swap was
        ("generation", 24.5, 42.6, (-9.0, -2.0), False),
        ("induction", 49.0, 51.0, (2.5, 3.5), True),
        ("induction", 51.0, 49.0, (0.5, 1.5), False),
        ("order_sensitivity", 10.0, 90.0, (40.0, 44.0), False),  # has no better direction
    ],
)
def test_a_repair_that_makes_behaviour_worse_says_so_in_its_verdict(
    metric, swap, repaired, left, worse
):
    """The worse the repair made it, the less its share of the KL counts."""
    found = pd.DataFrame([{
        "metric": metric, "stat": "it", "unit": "tokens", "teacher": 48.0, "swap": swap,
        "repaired": repaired, "left": repaired - 48, "left_lo": left[0], "left_hi": left[1],
        "back": float("nan"),
    }])  # fmt: skip
    plan = having_closed(0.2, 0.1, 0.3)
    plan.students["swap"] = plan.students["repaired"]
    line = f"the repair made {metric} it worse: 48.0 -> {swap} -> {repaired} tokens"
    assert (line in repair_verdict(plan, found)) is worse
    assert [said.startswith(line) for said in warnings(found, plan)] == [True] * worse
