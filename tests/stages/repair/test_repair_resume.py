"""A repair that was killed goes on: it ends at the weights of one that was not, to the bit, wherever it died."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import killed_repair
import pytest
import torch

from mismatch import config
from mismatch.stages import runner
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.ladder_stages import budget
from mismatch.stages.repair.ladder_stages.training import Trainer
from mismatch.stages.repair.result import Repaired

OTHERS = (
    *("closed-form:1", "closed-form:5", "local:0", "local:3", "block:2", "window:3"),
    *("saving:1", "saving:4", "saving:20"),
)


@pytest.fixture(autouse=True)
def _alike(monkeypatch):
    """One thread, for the order of sums depends on their number; no figures, for nobody looks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(runner, "write_html", lambda _folder: None)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Repaired:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "write_html", lambda _folder: None)
        return killed_repair.repaired(tmp_path_factory.mktemp("straight"), "run")


def killed(folder: Path, *moments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, killed_repair.__file__, str(folder), *moments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def resumed(run: Path) -> Repaired:
    assert json.loads((run / "manifest.json").read_text())["status"] == "running"
    settings = config.load(RepairConfig, run / "config.yaml")
    return runner.command("repair", settings, resume=run, progress=False)


def same(one: Repaired, other: Repaired) -> None:
    weights = dict(one.student.model.named_parameters())
    assert all(torch.equal(weights[n], p) for n, p in other.student.model.named_parameters())
    timed = ["seconds"]
    assert one.stages.drop(columns=timed).equals(other.stages.drop(columns=timed))


def test_killed_end_to_end(straight, tmp_path):
    killed(tmp_path, "end-to-end:3")
    same(resumed(tmp_path / "end-to-end:3"), straight)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_anywhere_else(straight, tmp_path):
    killed(tmp_path, *OTHERS)
    for moment in OTHERS:
        same(resumed(tmp_path / moment), straight)


def test_a_limit_in_minutes_is_planned_once(tmp_path, monkeypatch):
    """What fits into the time was measured by the process that died; the one that goes on must not measure anew."""
    run = tmp_path / "run"
    step = Trainer._step

    def stop(self, done):
        if done.steps == 3:
            self.stopping = lambda: True
        return step(self, done)

    monkeypatch.setattr(budget, "fitting", lambda *_: (12, 2))
    monkeypatch.setattr(Trainer, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        killed_repair.repaired(tmp_path, "run", stages=("local",), max_minutes=10)
    monkeypatch.setattr(Trainer, "_step", step)

    def unasked(*_):
        raise AssertionError("the steps were timed again")

    monkeypatch.setattr(budget, "fitting", unasked)
    settings = config.load(RepairConfig, run / "config.yaml")
    done = runner.command("repair", settings, resume=run, progress=False)
    assert done.stages["steps"].iloc[-1] == 12
