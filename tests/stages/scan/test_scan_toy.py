"""A whole scan of the trained toy: from Python and from the command line, beside trace and probe."""

from __future__ import annotations

import json

import pytest
from overflows import Overflows
from plans import read_back
from wonderland import documents, jsonl

import mismatch
from mismatch import cli, registry
from mismatch.errors import SpecError, UsageError
from mismatch.runs.folder import load_run

SMALL = {"tokens": 256, "seq_len": 64, "samples": 4, "length": 120, "calibration_tokens": 256}


@pytest.fixture(scope="module")
def texts():
    return {"data": documents(4), "calibration_data": documents(3, seed=1)}


@pytest.fixture(scope="module")
def scanned(toy, texts):
    return mismatch.scan(
        (toy.model, toy.tokenizer), "infini(segment=16); nope; mean", scored=1.0, **texts, **SMALL
    )


def test_it_is_the_trace_and_the_probe_of_each_swap(scanned, toy, texts):
    """Text as `trace` says it; induction and passkey as `probe` says them, on the very same inputs."""
    teacher = mismatch.load((toy.model, toy.tokenizer))
    student = mismatch.swap(teacher, "layer2:infini(segment=16)")
    traced = mismatch.trace(
        teacher, student, tokens=256, seq_len=64, controls=("mean",), metrics=("kl",),
        calibration_tokens=256, **texts,
    )  # fmt: skip
    probed = mismatch.probe(
        teacher, student, probes=("induction", "passkey"), samples=4, lengths=("120",), depths=("0.1",),
        controls=(), seq_len=64, **texts,
    )  # fmt: skip
    table = scanned.table
    mine = table[(table["layer"] == 2) & (table["position"] == "all")]

    def ours(student, metric, stat):
        rows = mine[
            (mine["student"] == student) & (mine["metric"] == metric) & (mine["stat"] == stat)
        ]
        return rows.iloc[0]

    def theirs(result, student, metric, stat):
        t = result.table
        rows = t[
            (t["student"] == student) & (t["metric"] == metric) & (t["stat"] == stat)
            & (t["site"] == "logits") & (t["position"] == "all")
        ]  # fmt: skip
        return rows.iloc[0]

    for name, there in (("infini(segment=16)", "swap"), ("mean", "mean")):
        a, b = ours(name, "kl", "mean"), theirs(traced, there, "kl", "mean")
        assert tuple(a[["value", "lo", "hi"]]) == pytest.approx(
            tuple(b[["value", "lo", "hi"]]), abs=1e-6
        )
        assert a["n"] == b["n"]
    for metric, stat in (
        ("induction", "nll_second"), ("induction", "nll_second_minus_teacher"),
        ("passkey", "logprob"), ("passkey", "logprob_minus_teacher"),
    ):  # fmt: skip
        a = ours("infini(segment=16)", metric, stat)
        b = theirs(probed, "swap", metric, stat)
        assert tuple(a[["value", "lo", "hi"]]) == pytest.approx(
            tuple(b[["value", "lo", "hi"]]), rel=1e-4, abs=1e-4
        )


def test_the_result(scanned):
    assert scanned.run_dir is None
    assert scanned.finite
    cells = scanned.cells
    assert set(cells["task"]) == {"text", "induction", "passkey"}
    assert set(cells["student"]) == {"infini(segment=16)", "nope", "mean", "zero"}
    assert (cells["kind"] != "missing").all()
    text = scanned.words()
    assert text.startswith("warning: needles is left out: a prompt of needles of 120 tokens has no")
    assert "warning: kv_lookup is left out: 12 pairs do not fit into a prompt of" in text
    assert "\nText: output KL, nats per token\n  infini(segment=16)\n    worst layers  " in text
    assert "against zero: " in text
    assert len(scanned.atlas().axes) == 6
    assert scanned.run.manifest["work"]["forwards_of_blocks"] == 1 + 4 * (4 + 3 + 2 + 1) / 4


def test_what_the_model_cannot_be_asked(toy, texts):
    model = (toy.model, toy.tokenizer)
    given = {**texts, **SMALL, "length": 200}
    left = mismatch.scan(model, "zero", among="3", **given)
    note = (
        "passkey is left out: a passkey prompt of 200 tokens is longer than the context of a loaded "
        "model: 128 tokens"
    )
    assert left.plan.notes[0] == note and len(left.plan.notes) == 3
    assert "needles is left out: a prompt of needles of 200 tokens is longer" in left.plan.notes[1]
    assert read_back(left.plan) == left.plan
    assert f"warning: {note}" in left.summary()
    with pytest.raises(UsageError, match="take a shorter --length, or leave the task out"):
        mismatch.scan(model, "zero", tasks=["passkey"], **given)
    with pytest.raises(UsageError, match="has no room: task, needle and question take") as caught:
        mismatch.scan(model, "zero", tasks=["passkey"], **{**given, "length": 30})
    assert caught.value.hint.startswith("take --length ")
    with pytest.raises(UsageError, match="--seq-len 200 is longer than the context of"):
        mismatch.scan(model, "zero", **{**given, "seq_len": 200})
    with pytest.raises(SpecError, match="layer 4 does not exist: the model has 4 layers"):
        mismatch.scan(model, "zero", among="0-4", **given)


@pytest.mark.pages
def test_the_command_writes_a_run_with_its_atlas(toy_folder, tmp_path, capsys):
    held_out = jsonl(tmp_path / "held_out.jsonl", documents(4))
    run = tmp_path / "run"
    words = [
        *("scan", "--model", str(toy_folder), "--swap", "nope", "--swap", "identity", "--device", "cpu"),
        *("--data", str(held_out), "--tokens", "256", "--seq-len", "64", "--samples", "2"),
        *("--length", "120", "--output", str(run)),
    ]  # fmt: skip
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(run)
    assert "  identity: exactly 0 in all 4 layers" in out
    said = err.splitlines()
    assert said[1] == "scan    4 layers x 3: nope, identity, zero (control)"
    assert said[2] == (
        "tasks   text (4 x 64 tokens), induction (2 x 127 tokens), passkey (2 x 120 tokens)"
    )
    assert said[4].startswith("time    about ")
    assert sorted(path.name for path in (run / "figures").iterdir()) == [
        f"atlas.{kind}" for kind in ("csv", "json", "png", "svg")
    ]
    page = (run / "report.html").read_text()
    assert "<h1>mismatch scan of " in page
    assert "Every layer" in page and "Against the controls" in page
    assert "mismatch scan --config run/config.yaml" in page
    assert load_run(run).plan.layers == (0, 1, 2, 3)
    before = (run / "report.html").read_bytes()
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").read_bytes() == before
    capsys.readouterr()
    again = tmp_path / "again"
    assert (
        cli.main(
            ["scan", "-q", "--json", "--config", str(run / "config.yaml"), "--output", str(again)]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["run"] == str(again)
    assert len(found["cells"]) == 3 * 3 * 4
    assert (again / "metrics.parquet").read_bytes() == (run / "metrics.parquet").read_bytes()
    assert cli.main(words) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert cli.main(["compare", str(run), str(again)]) == 2
    assert capsys.readouterr().err == (
        f"error: the run in {run} is a scan, not one swap: there is nothing to set beside another run\n\n"
        f"hint: a scan has its own picture: mismatch report {run}\n"
    )


def test_a_cell_that_overflows_ends_with_4_and_the_others_are_there(toy_folder, tmp_path, capsys):
    held_out = jsonl(tmp_path / "held_out.jsonl", documents(4))
    run = tmp_path / "run"
    registry.mechanisms().add("overflows", Overflows)
    try:
        code = cli.main(
            [
                *(
                    "scan",
                    "--model",
                    str(toy_folder),
                    "--swap",
                    "overflows",
                    "--device",
                    "cpu",
                    "-q",
                ),
                *("--data", str(held_out), "--tokens", "256", "--seq-len", "64", "--tasks", "text"),
                *("--output", str(run)),
            ]
        )
    finally:
        registry.mechanisms()._added.pop("overflows")
    assert code == 4
    out = capsys.readouterr().out
    assert "warning: overflows in layer 1: NaN or infinity on text" in out
    assert "  overflows: exactly 0 in all 3 layers" in out
    cells = load_run(run).table
    mine = cells[
        (cells["metric"] == "kl") & (cells["stat"] == "mean") & (cells["position"] == "all")
    ]
    assert mine[(mine["student"] == "zero")]["value"].notna().all()
    assert mine[(mine["student"] == "overflows") & (mine["layer"] == 1)]["value"].isna().all()
    assert json.loads((run / "manifest.json").read_text())["not_finite"] == ["overflows@1: text"]
