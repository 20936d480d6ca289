"""A plan: the choice, its evaluation on text that chose nothing, greedy, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from measured import cut, measured
from plans import read_back
from wonderland import documents, jsonl

import mismatch
from mismatch import cli
from mismatch.errors import ConfigError, DataError, UsageError
from mismatch.models.layout import Layout
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.plan.greedy import greedy
from mismatch.stages.plan.measured import cells_of, evaluate, swap_of
from mismatch.stages.scan.cells import cells, columns
from mismatch.stages.scan.stage import sweep_of
from mismatch.stages.scan.tasks import text_task
from mismatch.surgery.operate import blank
from mismatch.surgery.students import Teacher

SMALL = {
    "tokens": 256,
    "selection_tokens": 256,
    "seq_len": 64,
    "samples": 3,
    "length": 120,
    "calibration_tokens": 256,
}


@pytest.fixture(scope="module")
def teacher(tiny):
    model = tiny("llama")
    return Teacher(model, None, Layout.of(model), None)


def config(**changes):
    return PlanConfig(
        **{"model": "m", "mechanism": "random; mlp:zero", "layers": 2, "seq_len": 24, **changes}
    )


def output_kl(model, swap, windows):
    table, _ = measured(model, swap, metrics=("kl",), windows=windows)
    rows = table[(table["site"] == "logits") & (table["position"] == "all")]
    return float(rows[(rows["stat"] == "mean") & (rows["student"] == "swap")]["value"].iloc[0])


def test_an_evaluation_is_the_trace_of_the_choice_and_of_its_parts(teacher):
    model, task = teacher.model, text_task(cut())
    choice = {"random": [2, 0], "mlp:zero": [1]}
    assert swap_of(config(), choice) == "layers[0,2]:random; layer1.mlp:zero"
    measured = evaluate(teacher, config(), choice, (task,), None)
    sums = measured.sums
    assert sums.damage(measured.together, task).value == pytest.approx(
        output_kl(model, swap_of(config(), choice), cut()), abs=1e-6
    )
    alone = [output_kl(model, f"layer{at}:random", cut()) for at in (0, 2)]
    alone.append(output_kl(model, "layer1.mlp:zero", cut()))
    assert [sums.damage(cell, task).value for cell in measured.parts] == pytest.approx(
        alone, abs=1e-6
    )
    assert sums.total(measured.parts, task).value == pytest.approx(sum(alone), abs=1e-6)
    # The control stands in the very places: attention of 0 and 2, MLP of 1.
    (zero,) = measured.controls
    assert [(p.layer, p.slot) for p in zero.placements] == [(0, "attn"), (2, "attn"), (1, "mlp")]
    assert sums.damage(zero, task).value == pytest.approx(
        output_kl(model, "layers[0,2]:zero; layer1.mlp:zero", cut()), abs=1e-6
    )
    rows = {
        (r["metric"], r["stat"], r["student"], r["layer"]): r
        for r in measured.rows()
        if r.get("position", "all") == "all"
    }
    assert {row["stage"] for row in rows.values()} == {"plan"}
    rest = rows["kl", "mean_minus_sum", "swap", None]
    assert rest["value"] == pytest.approx(
        rows["kl", "mean", "swap", None]["value"]
        - rows["kl", "sum_of_parts", "swap", None]["value"]
    )
    assert rest["lo"] <= rest["value"] <= rest["hi"]
    assert ("kl", "mean_minus_zero", "swap", None) in rows


def test_consecutive_layers_are_written_as_ranges():
    assert swap_of(config(), {"random": [5, 3, 4, 9, 0, 1]}) == "layers[0-1,3-5,9]:random"


def test_one_layer_alone_is_its_own_sum(teacher):
    task = text_task(cut())
    measured = evaluate(teacher, config(layers=1), {"random": [1]}, (task,), None)
    rest = measured.rest(task)
    assert (rest.value, rest.lo, rest.hi) == (0.0, 0.0, 0.0)


def test_greedy_takes_the_cheapest_given_those_before(teacher):
    """Against traces of every pair that begins with the layer taken first."""
    settings, task = config(controls=()), text_task(cut())
    every = cells(columns(settings.templates, ()), (0, 1, 2), teacher.layout)
    sweep = sweep_of(teacher, settings, every, None)
    steps = greedy(sweep, every, (task,), settings)
    costs = {
        (cell.name, cell.layer): output_kl(teacher.model, str(cell_swap(settings, [cell])), cut())
        for cell in every
    }
    first = min(costs, key=costs.get)
    assert (steps[0].cell.name, steps[0].cell.layer) == first
    assert steps[0].kl.value == pytest.approx(costs[first], abs=1e-6)
    pairs = {
        (cell.name, cell.layer): output_kl(
            teacher.model, cell_swap(settings, [steps[0].cell, cell]), cut()
        )
        for cell in every
        if cell.layer != steps[0].cell.layer
    }
    second = min(pairs, key=pairs.get)
    assert (steps[1].cell.name, steps[1].cell.layer) == second
    # Drawn tensors depend on the order of clauses, so a random part may be another one: zeros are not.
    if second[0] == "mlp:zero":
        assert steps[1].kl.value == pytest.approx(pairs[second], abs=1e-6)
    assert len(steps) == 2
    assert len(sweep.base.plan.clauses) == 2


def cell_swap(settings, chosen):
    choice = {}
    for cell in chosen:
        choice.setdefault(cell.name, []).append(cell.layer)
    return swap_of(settings, choice)


def test_greedy_stops_at_the_budget(teacher):
    settings = config(layers=None, budget_kl=0.25, controls=())
    every = cells(columns(settings.templates, ()), (0, 1, 2), teacher.layout)
    task = (text_task(cut()),)
    steps = greedy(sweep_of(teacher, settings, every, None), every, task, settings)
    assert 1 <= len(steps) < 3
    assert all(step.kl.value <= 0.25 for step in steps)
    wanted = config(layers=3, budget_kl=0.25, controls=())
    with pytest.raises(
        UsageError, match=f"greedy ends after {len(steps)} layers: every further one breaks"
    ):
        greedy(sweep_of(teacher, wanted, every, None), every, task, wanted)


def test_evaluated_windows_are_none_of_those_that_chose():
    whole = cut(10)
    rest = whole.part(slice(5, None))
    np.testing.assert_array_equal(rest.ids, whole.ids[5:])
    # Documents 1, 2, 3, 0, 1 of the whole are 0, 1, 2, 3, 0 in order of appearance.
    assert rest.doc.tolist() == [0, 1, 2, 3, 0]
    assert rest.names == ("doc 1", "doc 2", "doc 3", "doc 0")


@pytest.fixture(scope="module")
def texts():
    return {"data": documents(8), "calibration_data": documents(3, seed=1)}


def test_from_python(toy, texts):
    made = mismatch.plan(
        (toy.model, toy.tokenizer), "infini(segment=16); sliding_window(16, 1)", layers=3, scored=1.0,
        **texts, **SMALL,
    )  # fmt: skip
    assert made.run_dir is None
    scores = {(s.mechanism, s.layer): s.kl for s in made.plan.scores}
    best = {at: min(("infini(segment=16)", "sliding_window(window=16, sinks=1)"), key=lambda m: scores[m, at])
            for at in range(4)}  # fmt: skip
    cheapest = sorted(range(4), key=lambda at: scores[best[at], at])[:3]
    assert read_back(made.plan) == made.plan
    chosen = {at: name for name, layers in made.plan.choice.items() for at in layers}
    assert chosen == {at: best[at] for at in cheapest}
    assert made.plan.predicted_by_scan.kl == pytest.approx(
        sum(scores[best[at], at] for at in cheapest)
    )
    text = made.words()
    assert text.startswith("warning: needles is left out: ")  # the toy's context is too short
    assert f"\n{made.swap}   (3 of 4 layers, milp)\n  the scan that chose them predicted " in text
    assert "  predicted, one at a time added up " in text
    assert "  zero in the same layers " in text
    assert text.endswith(f'next: mismatch trace --model a loaded model --swap "{made.swap}"')
    costs = made.costs
    assert list(costs[costs["task"] == "text"]["kind"]) == ["part"] * 3 + [
        "sum",
        "together",
        "control",
    ]
    assert len(made.figure().axes) == 3


@pytest.mark.pages
def test_the_command_keeps_its_scan_and_can_choose_from_it_again(toy_folder, tmp_path, capsys):
    held_out = jsonl(tmp_path / "held_out.jsonl", documents(8))
    run = tmp_path / "plan"
    words = [
        *("plan", "--model", str(toy_folder), "--mechanism", "infini(segment=16)", "--device", "cpu"),
        *("--data", str(held_out), "--tokens", "256", "--selection-tokens", "256", "--seq-len", "64", "--samples", "2"),
        *("--length", "120"),
    ]  # fmt: skip
    assert cli.main([*words, "--layers", "2", "--output", str(run)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(run)
    assert "scan    4 layers x 1: infini(segment=16)\n" in err
    manifest = json.loads((run / "manifest.json").read_text())
    scan = json.loads((tmp_path / "plan-scan" / "manifest.json").read_text())
    assert (manifest["kind"], scan["kind"], scan["status"]) == ("plan", "scan", "done")
    assert (tmp_path / "plan-scan" / "figures" / "atlas.png").exists()
    assert (run / "figures" / "plan.csv").exists()
    assert "mismatch plan of " in (run / "report.html").read_text()
    again = tmp_path / "again"
    chosen = [*words, "--layers", "2", "-q", "--scan", str(tmp_path / "plan-scan")]
    assert cli.main([*chosen, "--json", "--output", str(again)]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = json.loads((run / "plan.json").read_text())
    assert found["swap"] == plan["swap"]
    assert not (tmp_path / "again-scan").exists()
    # The evaluation is on the same windows and keys: not one that the scan has seen.
    first, second = (mismatch.load_run(path).table.drop(columns="run_id") for path in (run, again))
    assert first.equals(second)
    assert cli.main([*words, "--layers", "2", "--output", str(run)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    # A plan is no scan; another mechanism is not in it; a budget that cannot be kept.
    for more, text in (
        (["--scan", str(run)], f"the run in {run} is no scan"),
        (["--mechanism", "nope", "--scan", str(tmp_path / "plan-scan")], "has no `nope`"),
        (
            ["--layers", "4", "--budget-kl", "0.0001"],
            "no choice of 4 layers stays within a KL of 0.000100",
        ),
        (["--layers", "5"], "5 layers asked for, and 4 can hold infini(segment=16)"),
        (
            ["--keep-retrieval"],
            "the model itself does not find the passkey: there is nothing to keep",
        ),
        (
            ["--keep-retrieval", "--length", "200"],
            "needs a passkey, and none is measured: a passkey prompt of",
        ),
        (
            ["--keep-retrieval", "--length", "200", "--method", "greedy"],
            "needs a passkey, and none is measured",
        ),
    ):
        target = ["--output", str(tmp_path / "refused"), "--overwrite"]
        assert cli.main([*words, "-q", "--layers", "2", *more, *target]) == 2, text
        assert text in capsys.readouterr().err


def test_no_text_is_left_to_evaluate_on(toy, texts):
    with pytest.raises(DataError, match="none is left to evaluate it on"):
        mismatch.plan(
            (toy.model, toy.tokenizer), "zero", layers=1, data=documents(2, words=70),
            calibration_data=texts["calibration_data"], **{**SMALL, "selection_tokens": 4096},
        )  # fmt: skip


def test_a_scan_of_another_model(toy, model_folder, texts, tmp_path):
    run = tmp_path / "scan"
    small = {name: value for name, value in SMALL.items() if name != "selection_tokens"}
    mismatch.scan(
        (toy.model, toy.tokenizer), "zero", output=str(run), tasks=["text"], **texts, **small
    )
    with pytest.raises(UsageError, match="is of another model"):
        mismatch.plan(str(model_folder(rms_norm_eps=1e-3)), "zero", layers=1, scan=run, device="cpu",
                      **texts, **SMALL)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layers": None},
            "the number of layers to replace is not given\n\n"
            "hint: give --layers 8, or --budget-kl 0.5 for as many as that allows",
        ),
        (
            {"scan": "x", "method": "greedy"},
            "greedy scans anew after every layer; a finished scan cannot stand for that\n\n"
            "hint: leave out --scan, or take --method milp",
        ),
        ({"layers": 0}, "`layers` must be int >= 1 or none, got 0"),
        ({"budget_kl": 0.0}, "`budget_kl` must be float > 0 or none, got 0.0"),
        (
            {"method": "best"},
            "`method` must be one of milp, greedy, got `best`\n\nhint: available: greedy, milp",
        ),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert str(caught.value) == message


def test_cells_of_a_choice_share_their_first_block(teacher):
    together, parts, (control,) = cells_of(
        config(), {"random": [2], "mlp:zero": [1]}, teacher.layout
    )
    assert together.first == control.first == 1
    assert [(cell.name, cell.layer, cell.first) for cell in parts] == [
        ("random", 2, 2),
        ("mlp:zero", 1, 1),
    ]
    assert blank(teacher.layout).plan.first is None
