"""A training that was killed, or stopped by Ctrl-C, and resumed ends at the bits of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from trainings import words

from mismatch import cli
from mismatch.runs.folder import load_run
from mismatch.stages.train.trainer import Course, last_checkpoint

SAVES = ("--trainer", "save_steps=3", "--batch-size", "2")


@pytest.fixture(scope="module")
def unbroken(toy_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mismatch.stages.runner.write_html", lambda path: None)
        assert cli.main([*words(folder, toy_folder, *SAVES), "--output", str(folder / "run")]) == 0
    return folder


def assert_same(run: Path, other: Path) -> None:
    assert load_run(run).plan == load_run(other).plan
    for name in ("metrics.parquet", "checkpoint/model.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("moment", ["step-5", pytest.param("saving-2", marks=pytest.mark.slow)])
def test_killed_and_resumed(moment, unbroken, toy_folder, tmp_path, capsys):
    line, run = words(unbroken, toy_folder, *SAVES), tmp_path / "run"  # the same texts
    script = Path(__file__).with_name("killed_training.py")
    code = [sys.executable, str(script), moment, *line, "--output", str(run)]
    died = subprocess.run(code, check=False, timeout=100, stdout=subprocess.DEVNULL)
    assert died.returncode == -signal.SIGKILL
    assert json.loads((run / "manifest.json").read_text())["status"] == "running"
    assert Path(last_checkpoint(run / "trainer")).name == "checkpoint-3"
    assert cli.main(["train", "--resume", str(run), "-q"]) == 0, capsys.readouterr().err
    assert_same(run, unbroken / "run")


def test_ctrl_c_saves_and_goes_on(unbroken, toy_folder, tmp_path, capsys, monkeypatch):
    run, real = tmp_path / "run", Course.on_step_end

    def pressed(self, args, state, control, **options):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, args, state, control, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Course, "on_step_end", pressed)
        assert cli.main([*words(unbroken, toy_folder, *SAVES), "--output", str(run)]) == 130
    assert Path(last_checkpoint(run / "trainer")).name == "checkpoint-5"
    optimizer = run / "trainer" / "checkpoint-5" / "optimizer.pt"
    whole = optimizer.read_bytes()
    optimizer.write_bytes(whole[:1000])
    assert cli.main(["train", "--resume", str(run), "-q"]) == 1
    said = capsys.readouterr().err
    assert "error: the training cannot go on from" in said
    assert "checkpoint-5: PytorchStreamReader failed" in said
    assert "hint: delete that folder: --resume takes the checkpoint before it" in said
    optimizer.write_bytes(whole)
    assert cli.main(["train", "--resume", str(run), "-q"]) == 0, capsys.readouterr().err
    assert_same(run, unbroken / "run")
