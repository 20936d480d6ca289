"""Two processes give the table of one; a failure in one of them is told and leaves a run that can go on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import finished, free_port, start
from wonderland import command

import mismatch
from mismatch import cli
from mismatch.runs.folder import load_run
from mismatch.runs.ranks import Ranks, joined


def single(folder: Path, words: list[str]) -> Path:
    run = folder / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mismatch.stages.runner.write_html", lambda path: None)
        assert cli.main([*words, "--output", str(run)]) == 0
    return run


def assert_same_numbers(one: Path, two: Path) -> None:
    a, b = load_run(one).table, load_run(two).table
    numbers = ["value", "lo", "hi"]
    assert a.drop(columns=numbers).equals(b.drop(columns=numbers))
    for column in numbers:
        np.testing.assert_allclose(a[column], b[column], rtol=1e-5, atol=1e-9)


def test_two_processes_give_the_table_of_one(toy_folder, tmp_path):
    words = command(tmp_path, toy_folder, "--fail-on", "medium", "--probes", "induction,heads")
    done = finished(start([*words, "--output", str(tmp_path / "two")]))
    # 3: a finding of that severity, which both ranks know of.
    assert [code for code, _, _ in done] == [3, 3], done
    assert done[0][1].splitlines()[-1] == str(tmp_path / "two")
    assert done[1][1] == ""  # one voice
    del words[(at := words.index("--fail-on")) : at + 2]
    one = single(tmp_path, words)
    assert_same_numbers(one, tmp_path / "two")
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert (manifest["status"], manifest["ranks"]) == ("done", 2)
    assert not (tmp_path / "two" / "state").exists()


@pytest.mark.slow
def test_a_failure_of_the_second_rank_is_told_and_the_run_goes_on(toy_folder, tmp_path):
    """NaN in batch 3, which is the second rank's; then the same command again, without it."""
    run = tmp_path / "two"
    words = command(tmp_path, toy_folder, "--controls", "none")
    broken = (
        "import os\n"
        "from mismatch.errors import NumericsError\n"
        "from mismatch.forward.paired_sites import stream\n"
        "calls = []\n"
        "def fails(*args, **kwargs):\n"
        "    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 2:\n"
        "        raise NumericsError('NaN in the swap', hint='none')\n"
        "    return stream(*args, **kwargs)\n"
        "from mismatch.stages.trace import batches\n"
        "batches.stream = fails"
    )
    processes = start([*words, "--output", str(run)], broken)
    try:
        out, err = processes[1].communicate(timeout=60)
        assert processes[1].returncode == 4
        assert err.endswith(
            "error (rank 1): NaN in the swap (first in batch 3, windows 6-7)\n\nhint: none\n"
        )
        assert out == ""
        # The first rank does its share, saves it, and waits for the others.
        until = time.monotonic() + 60
        while not (run / "state" / "state.json").exists() and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        processes[0].terminate()  # as torchrun does
        processes[0].communicate(timeout=60)
    assert not (run / "metrics.parquet").exists()
    assert json.loads((run / "state" / "state.json").read_text())["info"]["next"] == 6
    done = finished(start(["trace", "--resume", str(run), "-q"]))
    assert [code for code, _, _ in done] == [0, 0], done
    assert_same_numbers(single(tmp_path, words), run)


def test_another_number_of_processes_is_refused(toy_folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    words = command(tmp_path, toy_folder, "--controls", "none", "--output", str(run))
    monkeypatch.setattr("mismatch.stages.trace.batches.SAVE_EVERY", -1.0)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mismatch.stages.trace.stage.Collector.rows", stop)
        assert cli.main(words) == 130
    state = json.loads((run / "state" / "state.json").read_text())
    state["fingerprint"]["ranks"] = "4"
    (run / "state" / "state.json").write_text(json.dumps(state))
    capsys.readouterr()
    assert cli.main(["trace", "--resume", str(run), "-q"]) == 2
    assert "  ranks: '4' then, '1' now" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun(toy_folder, tmp_path):
    run = tmp_path / "two"
    words = command(tmp_path, toy_folder)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("-m", "mismatch", *words, "--output", str(run)),
        ],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(run)
    assert done.stdout.count("output shift") == 1
    assert_same_numbers(single(tmp_path, words), run)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["trace", "repair"])
def test_two_nodes(toy_folder, tmp_path, stage):
    """Two torchruns meet, each with a process and a folder of its own; the second node keeps nothing."""
    words, port = command(tmp_path, toy_folder), str(free_port())
    if stage == "repair":
        words = [
            stage,
            *words[1:],
            "--train-tokens",
            "1024",
            "--val-tokens",
            "256",
            "--max-minutes",
            "none",
        ]
        words[words.index("--calibration-data")] = "--train-data"
        words[words.index("--tokens") + 1] = "256"
    nodes = []
    for node in range(2):
        (home := tmp_path / f"node{node}").mkdir()
        meet = ("--master-addr", "127.0.0.1", "--master-port", port)
        start = ("--nnodes", "2", "--node-rank", str(node), *meet, "--nproc-per-node", "1")
        nodes.append(
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", *start),
                    *("-m", "mismatch", *words, "--output", "run"),
                ],
                cwd=home,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    done = finished(nodes)
    assert [code for code, _, _ in done] == [0, 0], done
    assert done[0][1].splitlines()[-1] == "run" and done[1][1] == ""
    assert not [*(tmp_path / "node1").iterdir()]
    run = tmp_path / "node0" / "run"
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["status"], manifest["ranks"]) == ("done", 2)
    if stage == "trace":
        assert_same_numbers(single(tmp_path, words), run)
    else:  # that its numbers are those of one process: tests/stages/repair/test_repair_ranks.py
        assert mismatch.load(run / "checkpoint").model.swap_record.swaps


def test_shares_cover_every_batch_once():
    for world in (1, 2, 3):
        owners = [[rank for rank in range(world) if Ranks(rank, world).mine(i)] for i in range(7)]
        assert owners == [[i % world] for i in range(7)]


def test_alone_nothing_is_sent():
    with joined() as ranks:
        assert ranks == Ranks(0, 1)
        assert ranks.from_first("x") == "x"
        assert ranks.to_first("x") == ["x"]
        assert ranks.shared([1, 2, 3], lambda piece: 2 * piece) == [2, 4, 6]
        assert ranks.device("auto") is None
        assert ranks.device("cpu") == "cpu"
