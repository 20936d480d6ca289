"""Run folders, configs and checkpoints that name a class by its path: read by every command, and never run."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

import mismatch
from mismatch import cli
from mismatch.errors import ModelError
from mismatch.runs import table
from mismatch.runs.folder import RunFolder

EVIL = "planted.parts:Evil"


@pytest.fixture
def run(tmp_path):
    """A finished trace whose swap, metric and plan name a class of somebody's."""
    settings = {"model": "glassllm", "swap": [f"layer1.attn:{EVIL}"], "controls": [EVIL]}
    folder = RunFolder.create(
        "glassllm",
        settings["swap"][0],
        settings,
        kind="trace",
        resumable=True,
        output=tmp_path / "run",
    )
    row = {"run_id": folder.run_id, "mode": "free", "student": EVIL, "layer": 1, "site": "attn_out", "metric": EVIL,
           "stat": "mean", "value": 0.5, "n": 10}  # fmt: skip
    folder.write("metrics.parquet", table.to_parquet(table.as_table([row])))
    folder.write_plan({"spec": settings["swap"][0], "clauses": [], "warnings": []})
    folder.finish("interrupted")
    return folder.path


def said(capsys, *words):
    code = cli.main([str(word) for word in words])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("verb", ["diagnose", "repair", "probe"])
def test_a_command_that_starts_from_a_run(run, planted, capsys, verb):
    if verb == "probe":
        code, err = said(capsys, "probe", "--config", run / "config.yaml")
    else:
        code, err = said(capsys, verb, run)
    assert code == 2
    assert f"names `{EVIL}`, a class that is not mismatch's own" in err
    assert "--trust-remote-code" in err and "unexpected" not in err
    assert not planted.exists()


def test_a_run_that_goes_on(run, planted, capsys):
    code, err = said(capsys, "trace", "--resume", run)
    assert code == 2 and f"names `{EVIL}`" in err
    assert not planted.exists()


@pytest.mark.pages
def test_a_report_and_a_comparison(run, planted, capsys, tmp_path):
    for words in (("report", run), ("compare", run, run, "--output", tmp_path / "c.html")):
        code, err = said(capsys, *words)
        assert code in (0, 1, 2) and "unexpected" not in err
    assert not planted.exists()


def test_a_kind_of_run_that_is_a_class(run, planted, capsys):
    file = run / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"kind": EVIL}))
    for words in (("report", run), ("diagnose", run), ("trace", "--resume", run)):
        code, err = said(capsys, *words)
        assert code == 1
        assert "`kind` must be one of " in err and "unexpected" not in err
    assert not planted.exists()


def test_a_scan_to_plan_from(run, planted, capsys, toy_folder):
    file = run / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"kind": "scan"}))
    words = (
        "plan",
        "--model",
        toy_folder,
        "--mechanism",
        "nope",
        "--layers",
        "1",
        "--scan",
        run,
        "--device",
        "cpu",
    )
    code, err = said(capsys, *words, "--controls", "none", "-q")
    assert code != 0 and "unexpected" not in err
    assert not planted.exists()


def test_a_checkpoint(saved_toy, tmp_path, planted):
    folder = shutil.copytree(saved_toy, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    config["mismatch"]["swaps"] = [{"swap": f"layer1.attn:{EVIL}", "seed": 0}]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="--trust-remote-code"):
        mismatch.load(folder)
    assert not planted.exists()


def test_what_the_user_types_is_his_own(run, planted, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": "./nothing"}))
    code, err = said(
        capsys, "trace", "--config", tmp_path / "c.yaml", "--swap", f"layer1.attn:{EVIL}"
    )
    assert code == 2 and "no model folder ./nothing" in err  # the swap was taken
