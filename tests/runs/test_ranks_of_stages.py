"""Every stage that shares its work: two processes give the numbers of one, and one that dies ends the other."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import assert_told_of_the_dead, finished, free_port, start
from wonderland import documents, jsonl

from mismatch import cli
from mismatch.probes import PROBES
from mismatch.runs.folder import load_run
from mismatch.runs.plan import as_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SWAP = ("--swap", "layer2:infini(segment=16)")
TEXT = ("--seq-len", "64", "--batch-size", "2")
WINDOW = ("--mechanism", "sliding_window(8, 1)", "--controls", "zero", "--selection-tokens", "256")
PROBES = [name for name in PROBES if name != "needles"]  # too long for the toy
COMMANDS = {
    "probe": ("probe", *SWAP, "--probes", ",".join(PROBES), "--samples", "4", "--lengths", "120", "--depths", "0.1,0.9",
              "--lookup-pairs", "3", "--lookup-length", "120", "--planned-gate-lr", "0.001"),
    "trace with probes": ("trace", *SWAP, "--tokens", "512", "--probes", "induction,heads"),
    "diagnose": ("diagnose", *SWAP, "--tokens", "512", "--fit-tokens", "512"),
    "plan": ("plan", *WINDOW, "--layers", "2", "--tokens", "256"),
    "plan, greedy": ("plan", *WINDOW, "--method", "greedy", "--layers", "3", "--tokens", "256"),
    "plan, restore one": ("plan", *WINDOW, "--score", "restore_one", "--layers", "2", "--tokens", "256"),
}  # fmt: skip


def words(folder: Path, model: Path, name: str) -> list[str]:
    command, *rest = COMMANDS[name]
    held_out = jsonl(folder / "held_out.jsonl", documents(12))
    calibration = jsonl(folder / "calibration.jsonl", documents(6, seed=1))
    text = ("--data", str(held_out), "--calibration-data", str(calibration))
    return [command, "--model", str(model), "--device", "cpu", "--quiet", *text, *TEXT, *rest]


@pytest.mark.parametrize("name", COMMANDS)
def test_two_processes_give_the_numbers_of_one(name, toy_folder, tmp_path):
    line = words(tmp_path, toy_folder, name)
    one, two = tmp_path / "one", tmp_path / "two"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mismatch.stages.runner.write_html", lambda path: None)
        assert cli.main([*line, "--output", str(one)]) == 0
    done = finished(start([*line, "--output", str(two)]))
    assert [code for code, _, _ in done] == [0, 0], done
    assert done[0][1].splitlines()[-1] == str(two)
    assert done[1][1] == ""  # one voice
    a, b = load_run(one), load_run(two)
    numbers = ["value", "lo", "hi"]
    assert a.table.drop(columns=numbers).equals(b.table.drop(columns=numbers))
    for column in numbers:
        np.testing.assert_allclose(a.table[column], b.table[column], rtol=1e-6, atol=1e-12)
    same, other = (json.dumps(as_json(run.plan), default=str) for run in (a, b))
    assert same == other
    assert (a.manifest["ranks"], b.manifest["ranks"]) == (1, 2)


def test_two_nodes(toy_folder, tmp_path):
    """torchrun twice on one machine, a process each."""
    line = words(tmp_path, toy_folder, "probe")
    line[line.index("--probes") + 1] = "induction,memory,heads"
    one, two, port = tmp_path / "one", tmp_path / "two", str(free_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mismatch.stages.runner.write_html", lambda path: None)
        assert cli.main([*line, "--output", str(one)]) == 0
    launch = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
    )
    where = ("--master-addr", "127.0.0.1", "--master-port", port)
    nodes = [
        subprocess.Popen(
            [
                *launch,
                *where,
                "--node-rank",
                str(rank),
                "-m",
                "mismatch",
                *line,
                "--output",
                str(two),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = finished(nodes)
    assert [code for code, _, _ in done] == [0, 0], done
    numbers = load_run(one).table["value"], load_run(two).table["value"]
    np.testing.assert_allclose(*numbers, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["probe", "diagnose", "plan"])
def test_a_rank_that_dies_ends_the_run(name, toy_folder, tmp_path):
    """Rank 1 is gone behind its first share; rank 0 says so within a minute, and its folder too."""
    dies = (
        "import os\n"
        "from mismatch.runs.ranks import Ranks\n"
        "real = Ranks.everywhere\n"
        "def everywhere(self, value):\n"
        "    if value is not None and self.rank == 1:\n"
        "        os._exit(9)\n"
        "    return real(self, value)\n"
        "Ranks.everywhere = everywhere"
    )
    run, begun = tmp_path / "run", time.monotonic()
    line = [*words(tmp_path, toy_folder, name), "--output", str(run)]
    done = finished(start(line, dies))
    assert time.monotonic() - begun < 60
    assert_told_of_the_dead(done, run)
