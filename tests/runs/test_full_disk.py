"""A disk that fills up while a run is written: what is said, what is kept, and that it goes on."""

from __future__ import annotations

import errno
import json
import os

import pytest
from wonderland import documents, jsonl

from mismatch import cli
from mismatch.runs.folder import load_run

SWAP = "layer1:zero"


@pytest.fixture
def text(tmp_path):
    return jsonl(tmp_path / "text.jsonl", documents(4))


@pytest.fixture
def full_disk(monkeypatch):
    """From the n-th rename on the disk is full; `full_disk(n)`, `full_disk(None)` makes room again."""
    plain, state = os.replace, {"left": None}

    def replace(source, target):
        if state["left"] is not None:
            if state["left"] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            state["left"] -= 1
        return plain(source, target)

    monkeypatch.setattr(os, "replace", replace)
    return lambda left: state.update(left=left)


def test_full_disk(toy_folder, text, tmp_path, capsys, monkeypatch, full_disk):
    """The run says what it could not write, keeps what it had, and goes on when there is room."""
    monkeypatch.setattr("mismatch.stages.trace.batches.SAVE_EVERY", -1.0)
    words = [
        "trace",
        "--model",
        str(toy_folder),
        "--data",
        str(text),
        "--swap",
        SWAP,
        "-q",
        "--device",
        "cpu",
    ]
    words += ["--controls", "none", "--tokens", "512", "--seq-len", "64", "--batch-size", "2"]
    assert cli.main([*words, "--output", str(tmp_path / "whole")]) == 0
    whole = (tmp_path / "whole" / "metrics.parquet").read_bytes()
    capsys.readouterr()
    for room in (4, 7, 10):
        run = tmp_path / f"run{room}"
        full_disk(room)
        code = cli.main([*words, "--output", str(run)])
        full_disk(None)
        out, err = capsys.readouterr()
        assert (code, out) == (1, "")
        assert err.startswith(f"error: could not write {run}/")
        assert err.endswith(
            ": No space left on device\n\nhint: the disk is full; what was written before is intact: free some "
            "space, then go on with --resume\n"
        )
        assert not list(run.rglob("*.tmp"))
        json.loads((run / "manifest.json").read_text())
        assert cli.main(["trace", "--resume", str(run), "-q"]) == 0
        assert (run / "metrics.parquet").read_bytes() == whole
        assert load_run(run).manifest["status"] == "done"
        capsys.readouterr()
