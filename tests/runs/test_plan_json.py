"""plan.json: every plan comes back as it was written, and one that does not fit names the field."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from plans import read_back, replaced, scan_plan, task_plan

from mismatch import registry
from mismatch.errors import RunError
from mismatch.runs.files import json_text
from mismatch.runs.folder import Run, RunFolder, load_run
from mismatch.runs.plan import SwapPlan, as_json, from_json
from mismatch.stages.diagnose.numbers import Correction, Found, Kl, Share
from mismatch.stages.diagnose.plan import DiagnosisPlan
from mismatch.stages.plan.choose import Score
from mismatch.stages.plan.plan import Budgets, ChoicePlan, Predicted, StepPlan
from mismatch.stages.repair.ladder_stages.stage_result import Look, StageResult
from mismatch.stages.repair.plan import Branch, Gates, RepairPlan, StudentReading
from mismatch.stages.scan.plan import ColumnPlan, ScanPlan
from mismatch.stages.train import plan as train

NAN = math.nan

SWAP: dict[str, Any] = {
    "spec": "layer2:infini(segment=16); final_norm:dyt",
    "clauses": (
        replaced(
            "infini",
            args={"segment": 16, "update": "linear", "gate": None, "alpha": 0.5, "of": ["a"]},
            inherited={"q_proj.weight": 64},
            new_parameters={"gate": 9},
            notes=("one", "two"),
        ),
        replaced("dyt", "final_norm", None, dropped={"weight": 8}),
    ),
    "warnings": ("short text",),
}
KL = Kl(0.06, 0.05, NAN, 512)
FOUND = Found(
    swap="layer2:infini(segment=16)",
    damage=KL,
    nll=Share(0.01, -0.01, 0.03),
    controls={"zero": Kl(1.0, 0.9, 1.1, 512)},
    corrections=(
        Correction("scale", "distribution", Share(0.5, 0.4, 0.6), KL),
        Correction("head 3", "part", Share(NAN, NAN, NAN), KL, 2, 3, True, "head 3 corrected"),
    ),
    causes={"distribution": Share(0.5, 0.4, 0.6)},
    joint={"distribution+position": Share(0.7, NAN, NAN)},
    unexplained=Share(0.3, 0.2, 0.4),
    leading="scale",
    places=({"layer": 2, "site": "attn_out", "mechanisms": ["infini"], "scale": {"gain": 0.5}},),
    behind={"layers": [2, 3], "errors": [0.1, 0.2], "growth": 2.0},
    not_applicable=("rope: no attention",),
    evidence=({"probe": "induction", "value": -1.0},),
)
SCAN = scan_plan(
    columns=(ColumnPlan("nope", False, ("zero",)), ColumnPlan("zero", True, ())),
    tasks={"text": task_plan(None), "passkey": task_plan(40.0)},
    notes=("a note",),
)
REPAIR = RepairPlan(
    **SWAP,
    stages=(
        StageResult("swap", "everywhere", 0.06, 0.05, 0.07, 3.0, 0.0),
        StageResult(
            name="local",
            tokens=512,
            seconds=1.5,
            steps=8,
            kept=False,
            looks=[Look(4, 512, 1.5, NAN, {"gate": [NAN, 1.0]})],
            gates={"gate": [[0.0], [1.0]]},
            notes=["undone"],
        ),
    ),
    students={
        "swap": StudentReading((0.1, 0.0, 0.2), (3.0, 2.9, 3.1), (0.0, NAN, NAN), (NAN, NAN, NAN))
    },
    branches=(
        Branch(2, "attn", "memory", 0.1, 0.0, 0.2, 0.05, 0.01, 0.09, "used"),
        Branch(3, "mlp", None),
    ),
    gates=Gates({"gate": "memory"}, {"gate": [0.0, NAN]}, {"gate": [1.0, 2.0]}),
    notes=("trained on text",),
    teacher={"model": "toy", "sha256": "ab12"},
)
PLANS = {
    "swap": SwapPlan(**SWAP),
    "nothing replaced": SwapPlan(spec="none", clauses=()),
    "diagnosis": DiagnosisPlan(**SWAP, diagnosis=FOUND, verdict="a cause"),
    "no damage": DiagnosisPlan(
        **SWAP, diagnosis=Found("layer2:identity", KL, Share(0.0, 0.0, 0.0)), verdict="none"
    ),
    "scan": SCAN,
    "choice": ChoicePlan(
        model="toy",
        swap="layers1,3:nope",
        method="milp",
        choice={"nope": (1, 3)},
        n_layers=4,
        among=(0, 1, 3),
        budgets=Budgets(0.5, None),
        tasks=SCAN.tasks,
        notes=(),
        scan="toy_nope_ab12",
        scores=(Score(1, "nope", 0.1, NAN), Score(3, "nope", 0.2)),
        predicted_by_scan=Predicted(0.3, NAN),
    ),
    "greedy": ChoicePlan(
        model="toy",
        swap="layer1:nope",
        method="greedy",
        choice={"nope": (1,)},
        n_layers=4,
        among=(1,),
        budgets=Budgets(None, 1.0),
        tasks={},
        notes=("a note",),
        steps=(StepPlan(1, "nope", 0.1, 0.0, 0.2, NAN),),
    ),
    "repair": REPAIR,
    "train": train.TrainPlan(
        **SWAP,
        looks=(train.Look(4, 512, 0.1, NAN, (0.0, NAN), {"passkey exact": 0.5}),),
        step=4,
        students={"swap": train.StudentReading((0.1, NAN, NAN), (3.0, 2.9, 3.1), (0.0, -0.1, 0.1))},
        parameters=9,
        notes=("trained on text",),
    ),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_plan_comes_back_as_it_was_written(plan):
    found = read_back(plan)
    assert type(found) is type(plan)
    assert repr(found) == repr(
        plan
    )  # == is false where a NaN stands; tuples, ints and floats are told apart


def test_every_plan_class_of_a_stage_is_among_them():
    stages = registry.stages()
    named = {stages.card(name).facts["plan"] for name in stages.names()}
    assert {registry.load(name) for name in named} == {type(plan) for plan in PLANS.values()}


def test_what_json_lacks_is_null_in_the_file_and_nan_in_the_plan():
    written = json.loads(json_text(as_json(REPAIR)))
    assert written["gates"]["start"]["gate"] == [0.0, None]
    found = from_json(RepairPlan, written, None)
    assert math.isnan(found.gates.start["gate"][1])
    assert math.isnan(found.students["swap"].gap_closed[1])
    assert from_json(Budgets, {"kl": None, "lost": 1}, None) == Budgets(None, 1.0)


def test_a_run_has_the_plan_class_of_its_stage_from_its_folder_and_in_memory(tmp_path):
    folder = RunFolder.create("toy", "nope", {}, kind="scan", output=tmp_path / "run")
    folder.write_plan(SCAN)
    table = folder.write_table(
        [{"layer": 1, "site": "logits", "metric": "kl", "stat": "mean", "value": 0.5, "n": 4,
          "mode": "free", "student": "nope"}]
    )  # fmt: skip
    folder.finish("done")
    read = load_run(folder.path).plan
    kept = Run.in_memory(table, folder.manifest, SCAN, {}, []).plan
    assert type(read) is type(kept) is ScanPlan
    assert repr(read) == repr(kept) == repr(SCAN)


def changed(plan: Any, path: tuple[Any, ...], value: Any) -> Any:
    """What plan.json of a plan would hold, with one value set; `...` takes the field out."""
    data = json.loads(json_text(as_json(plan)))
    *way, last = path
    inner = data
    for key in way:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return data


@pytest.mark.parametrize(
    ("plan", "path", "value", "message"),
    [
        ("swap", ("spec",), ..., "`spec` is missing"),
        ("swap", ("clauses", 1, "state"), ..., "`clauses[1].state` is missing"),
        ("swap", ("clauses", 0, "inherited"), None, "`clauses[0].inherited` must be dict, got None"),
        ("swap", ("clauses", 0, "args"), [], "`clauses[0].args` must be dict, got []"),
        ("swap", ("clauses", 0, "layer"), "2", "`clauses[0].layer` must be int, got '2'"),
        ("swap", ("clauses", 0, "layer"), 2.0, "`clauses[0].layer` must be int, got 2.0"),
        ("swap", ("clauses", 0, "dropped"), {"w": True}, "`clauses[0].dropped.w` must be int, got True"),
        ("swap", ("clauses",), {}, "`clauses` must be tuple, got {}"),
        ("swap", ("clauses", 0), "infini", "`clauses[0]` must be Replaced, got 'infini'"),
        ("swap", ("warnings",), "short", "`warnings` must be tuple, got 'short'"),
        ("diagnosis", ("verdict",), None, "`verdict` must be str, got None"),
        ("diagnosis", ("diagnosis",), None, "`diagnosis` must be Found, got None"),
        ("diagnosis", ("diagnosis", "causes", "distribution", "lo"), "0",
         "`diagnosis.causes.distribution.lo` must be float, got '0'"),
        ("diagnosis", ("diagnosis", "damage", "n"), ..., "`diagnosis.damage.n` is missing"),
        ("scan", ("tasks", "passkey", "chance"), ..., "`tasks.passkey.chance` is missing"),
        ("scan", ("tasks",), None, "`tasks` must be dict, got None"),
        ("scan", ("columns", 0, "control"), 1, "`columns[0].control` must be bool, got 1"),
        ("choice", ("choice", "nope"), [1, None], "`choice.nope[1]` must be int, got None"),
        ("choice", ("budgets",), None, "`budgets` must be Budgets, got None"),
        ("choice", ("predicted_by_scan",), 0.3, "`predicted_by_scan` must be Predicted, got 0.3"),
        ("repair", ("students", "swap", "kl"), [0.1, 0.2], "`students.swap.kl` must be tuple, got [0.1, 0.2]"),
        ("repair", ("gates", "start", "gate"), 0.0, "`gates.start.gate` must be list, got 0.0"),
        ("repair", ("stages", 0, "name"), ..., "`stages[0].name` is missing"),
        ("repair", ("stages", 1, "looks", 0), None, "`stages[1].looks[0]` must be Look, got None"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_that_names_the_field(tmp_path, plan, path, value, message):
    data = changed(PLANS[plan], path, value)
    file = tmp_path / "plan.json"
    with pytest.raises(RunError) as caught:
        from_json(type(PLANS[plan]), data, file)
    said, _, hint = str(caught.value).partition("\n\nhint: ")
    assert said == f"{file} is not the plan of such a run: {message}"
    assert hint == "the file was changed by hand, or made by another version of mismatch"


@pytest.mark.parametrize("data", [None, [], "layer2:zero", 1.0])
def test_what_is_no_plan_at_all(data):
    with pytest.raises(
        RunError, match="the plan is not the plan of such a run: it must be SwapPlan"
    ):
        from_json(SwapPlan, data, None)


def test_a_field_with_a_default_may_be_absent_and_an_unknown_one_is_passed_over():
    plan = PLANS["swap"]
    data = changed(plan, ("warnings",), ...) | {"of a later version": 1}
    assert from_json(SwapPlan, data, None) == dataclasses.replace(plan, warnings=())


def test_a_run_of_another_stage_is_refused_with_its_file(tmp_path):
    folder = RunFolder.create("toy", "nope", {}, kind="scan", output=tmp_path / "run")
    folder.write_plan(PLANS["swap"])
    folder.write_table(
        [{"layer": 1, "site": "logits", "metric": "kl", "stat": "mean", "value": 0.5, "n": 4,
          "mode": "free", "student": "nope"}]
    )  # fmt: skip
    run = load_run(folder.path)
    with pytest.raises(RunError) as caught:
        _ = run.plan
    assert f"{folder.path / 'plan.json'} is not the plan of such a run: `model` is missing" in str(
        caught.value
    )
