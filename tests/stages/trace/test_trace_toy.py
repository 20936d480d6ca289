"""Whole runs on the trained toy, by Python and by the command line."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from plans import read_back
from wonderland import command, documents

import mismatch
from mismatch import cli, config
from mismatch.errors import DataError, ModelError, NumericsError, OutputError, UsageError
from mismatch.runs.folder import load_run
from mismatch.runs.table import COLUMNS
from mismatch.stages.trace.config import TraceConfig

TEXTS = documents(4)
SMALL = {"tokens": 256, "seq_len": 64, "batch_size": 2}


@pytest.fixture(scope="module")
def teacher(toy):
    return mismatch.load((toy.model, toy.tokenizer))


def shift(result, student="swap"):
    t = result.table
    t = t[
        (t["metric"] == "kl")
        & (t["site"] == "logits")
        & (t["stat"] == "mean")
        & (t["position"] == "all")
    ]
    return float(t[t["student"] == student]["value"].item())


def test_both_texts_may_be_strings_and_must_differ(teacher):
    result = mismatch.trace(
        teacher,
        swap="layer2:mean",
        data=TEXTS[:2],
        calibration_data=TEXTS[2:],
        controls=(),
        **SMALL,
    )
    assert shift(result) > 0.01
    assert result.run.config["calibration_data"] == "given texts"
    with pytest.raises(DataError, match="share 1 document"):
        mismatch.trace(
            teacher,
            swap="layer2:mean",
            data=TEXTS[:2],
            calibration_data=TEXTS[1:3],
            controls=(),
            **SMALL,
        )


@pytest.mark.pages
def test_python(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = mismatch.swap(teacher, "layer2:infini(segment=16)")
    result = mismatch.trace(teacher, student, data=TEXTS, controls=(), **SMALL)
    assert result.run_dir is None
    assert list(tmp_path.iterdir()) == []  # nothing is written unless asked for
    assert [c.name for c in COLUMNS] == list(result.table.columns)
    assert set(result.table["student"]) == {"swap", "floor"}
    assert shift(result) > 0.01
    assert result.plan.spec == "layer2:infini(segment=16)"
    assert read_back(result.plan) == result.plan == student.plan
    assert result.run.config["dtype"] == "float32"
    assert {f.severity for f in result.findings} <= {"info", "low", "medium", "high"}
    page = result.to_html("report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert "<html" in page.read_text()
    assert result._repr_html_().startswith("<pre>")
    assert "infini" in result._repr_html_()
    assert "KL" in result.summary()
    figure = result.heatmap(metric="rel_l2")
    assert figure.axes
    # The same by the text of the swap, in a run folder that can be read back.
    kept = mismatch.trace(
        teacher, swap="layer2:infini(segment=16)", data=TEXTS, controls=(), output="run", **SMALL
    )
    assert str(kept.run_dir) == "run"
    drop = ["run_id"]
    assert kept.table.drop(columns=drop).equals(result.table.drop(columns=drop))
    assert load_run("run").table.equals(kept.table)
    student.undo()
    with pytest.raises(UsageError, match="holds no swap any more: it was undone"):
        mismatch.trace(teacher, student, data=TEXTS, controls=(), **SMALL)
    with pytest.raises(OutputError, match="exists and is not empty"):
        mismatch.trace(teacher, swap="layer2:zero", data=TEXTS, output="run", **SMALL)


def test_a_student_of_another_teacher_is_refused(teacher, tiny, toy):
    other = tiny("llama", vocab_size=len(toy.tokenizer))
    student = mismatch.swap((other, toy.tokenizer), "layer1:zero")
    with pytest.raises(
        ModelError, match="is not of the teacher's shape: layers 3, the teacher's is 4"
    ):
        mismatch.trace(teacher, student, data=TEXTS, controls=(), **SMALL)


def test_calibration_is_read_only_when_something_calibrates(teacher):
    given = {"data": TEXTS, "calibration_data": "no_such_text", **SMALL}
    assert shift(mismatch.trace(teacher, swap="layer2:zero", controls=("skip",), **given)) > 0
    for settings in (
        {"swap": "layer2:zero", "controls": ("mean",)},
        {"swap": "layer2:parallel(mean, alpha=1)", "controls": ()},
    ):
        with pytest.raises(UsageError, match="no text no_such_text"):
            mismatch.trace(teacher, **settings, **given)


def test_half_precision_has_a_floor(toy):
    """Against the model in float32: what the format alone brings."""
    model = mismatch.models.load.load(toy.info.path, dtype="bfloat16", device="cpu").model
    teacher = mismatch.load((model, toy.tokenizer))
    result = mismatch.trace(teacher, swap="layer2:zero", data=TEXTS, controls=(), **SMALL)
    assert 1e-7 < shift(result, "floor") < 1e-2 < shift(result)
    swap = result.table[
        (result.table["student"] == "swap") & result.table["metric"].isin(("kl", "rel_l2", "nll"))
    ]
    assert len(swap)
    assert swap["value"].notna().all()
    assert result.run.config["dtype"] == "bfloat16"


@pytest.fixture
def overflowing(monkeypatch):
    """`zero` gives infinity, from its third forward pass on a whole batch."""
    from mismatch.mechanisms.zero import Zero

    plain, calls = Zero.forward, []

    def forward(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        value = out[0] if isinstance(out, tuple) else out
        calls.append(value.shape)
        if sum(shape[:2] == (2, 64) for shape in calls) >= 3:
            value.fill_(float("inf"))
        return out

    monkeypatch.setattr(Zero, "forward", forward)


def test_infinity_ends_the_run(toy_folder, tmp_path, capsys, overflowing):
    run = tmp_path / "run"
    words = command(
        tmp_path, toy_folder, "--output", str(run), "--controls", "none", swap="layer2:zero"
    )
    assert cli.main(words) == 4
    text = "infinity in the swap's activations: layer 2, attn_out (first in batch 2, windows 4-5)"
    assert f"error: {text}\n\nhint: a swapped layer that overflows?" in capsys.readouterr().err
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert text in manifest["error"]
    assert text in (run / "log.txt").read_text()
    assert not (run / "metrics.parquet").exists()


def test_infinity_in_python(teacher, overflowing):
    with pytest.raises(NumericsError, match="layer 2, attn_out") as caught:
        mismatch.trace(
            teacher,
            swap="layer2:zero",
            data=TEXTS,
            controls=(),
            tokens=512,
            seq_len=64,
            batch_size=2,
        )
    assert caught.value.exit_code == 4


def test_command_line(toy_folder, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    words = command(tmp_path, toy_folder, "--output", str(run))
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert out.rstrip().splitlines()[-1] == str(run)
    assert "output shift, nats per token" in out
    found = load_run(run)
    assert set(found.table["student"]) == {"swap", "zero", "mean", "floor"}
    assert found.manifest["status"] == "done"
    assert found.manifest["texts"]["evaluation"]["tokens"] == 768
    assert not (run / "state").exists()
    # config.yaml repeats the run, to the byte, in a folder of another name.
    assert "output" not in yaml.safe_load((run / "config.yaml").read_text())
    again = tmp_path / "again"
    assert config.load(TraceConfig, run / "config.yaml").swap == ("layer2:infini(segment=16)",)
    assert (
        cli.main(["trace", "--config", str(run / "config.yaml"), "--output", str(again), "-q"]) == 0
    )
    assert (again / "metrics.parquet").read_bytes() == (run / "metrics.parquet").read_bytes()


def test_nnsight_gives_the_same_bits(teacher):
    tables = [
        mismatch.trace(
            teacher,
            swap="layers[1,2]:zero",
            data=TEXTS,
            controls=("skip",),
            backend=backend,
            **SMALL,
        ).table.drop(columns="run_id")
        for backend in ("hooks", "nnsight")
    ]
    assert tables[0].equals(tables[1])


def test_the_teacher_stays_what_it_was(teacher):
    ids = torch.arange(3, 67).reshape(1, 64)
    with torch.no_grad():
        before = teacher.model(input_ids=ids).logits
        mismatch.trace(
            teacher,
            swap="layers0-3:random; norms:identity",
            data=TEXTS,
            controls=("zero",),
            **SMALL,
        )
        assert torch.equal(teacher.model(input_ids=ids).logits, before)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in teacher.model.modules())
