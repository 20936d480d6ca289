"""Two processes end at the weights of one that has the same batches; a rank that dies ends the other."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from processes import finished, start
from safetensors.torch import load_file
from trainings import FSDP2, ON_CPU, words

import mismatch
from mismatch import cli
from mismatch.runs.folder import load_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", params=["swapped", "all"])
def one(request, toy_folder, tmp_path_factory):
    """One process with the batches of two: its command, and its run."""
    folder = tmp_path_factory.mktemp("one")
    line = words(folder, toy_folder, "--parameters", request.param, "--trainer", "save_steps=4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mismatch.stages.runner.write_html", lambda path: None)
        assert cli.main([*line, "--batch-size", "4", "--output", str(folder / "run")]) == 0
    return line, folder / "run"


def assert_same(run: Path, other: Path) -> None:
    a, b = load_run(run), load_run(other)
    assert [look.step for look in a.plan.looks] == [look.step for look in b.plan.looks] == [0, 4, 8]
    assert [look.tokens for look in a.plan.looks] == [look.tokens for look in b.plan.looks]
    numbers = ["value", "lo", "hi"]
    other_names = [*numbers, "run_id"]  # it holds the batch size
    assert a.table.drop(columns=other_names).equals(b.table.drop(columns=other_names))
    for column in numbers:
        np.testing.assert_allclose(a.table[column], b.table[column], rtol=1e-3, atol=1e-6)
    for checkpoint in ("checkpoint", "trainer/checkpoint-8"):
        theirs, ours = (load_file(one / checkpoint / "model.safetensors") for one in (other, run))
        assert theirs.keys() == ours.keys()
        assert max(float((theirs[name] - ours[name]).abs().max()) for name in theirs) < 1e-5


def test_two_processes(one, tmp_path):
    line, run = one
    done = finished(start([*line, "--batch-size", "2", "--output", str(tmp_path / "two")]))
    assert [code for code, _, _ in done] == [0, 0], done
    assert done[0][1].splitlines()[-1] == str(tmp_path / "two")
    assert done[1][1] == ""  # one voice
    assert_same(tmp_path / "two", run)


def test_fsdp2(one, tmp_path, monkeypatch):
    """Sharded by accelerate; the checkpoints of the Trainer are whole, of the plain class, and load."""
    line, run = one
    for name, value in {**FSDP2, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "sharded"
    done = finished(start([*line, "--batch-size", "2", "--output", str(output)], ON_CPU))
    assert [code for code, _, _ in done] == [0, 0], done
    assert "sharded: FSDPLlamaForCausalLM" in done[0][1]
    assert_same(output, run)
    config = json.loads((output / "trainer" / "checkpoint-8" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert mismatch.load(output / "trainer" / "checkpoint-8").info.sha256


def test_a_rank_that_dies_ends_the_run_and_it_goes_on(toy_folder, tmp_path):
    line = words(tmp_path, toy_folder, "--batch-size", "2", "--trainer", "save_steps=3")
    run = tmp_path / "run"
    dies = (
        "import os\n"
        "from mismatch.stages.train.trainer import Course\n"
        "real = Course.on_step_end\n"
        "def step(self, args, state, control, **options):\n"
        "    if state.global_step == 5 and os.environ['RANK'] == '1':\n"
        "        os._exit(9)\n"
        "    return real(self, args, state, control, **options)\n"
        "Course.on_step_end = step"
    )
    begun = time.monotonic()
    (code, _, err), (died, _, _) = finished(start([*line, "--output", str(run)], dies))
    assert (code, died) == (1, 9) and time.monotonic() - begun < 60
    assert "error" in err
    assert json.loads((run / "manifest.json").read_text())["status"] == "failed"
    done = finished(start(["train", "--resume", str(run), "-q"]))
    assert [code for code, _, _ in done] == [0, 0], done
    whole = tmp_path / "whole"
    assert all(code == 0 for code, _, _ in finished(start([*line, "--output", str(whole)])))
    assert (run / "checkpoint" / "model.safetensors").read_bytes() == (
        whole / "checkpoint" / "model.safetensors"
    ).read_bytes()
