"""Out of memory halves the batch in every stage: the numbers are those of the smaller batch from the start."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from processes import finished, start
from wonderland import documents, jsonl

import mismatch
from mismatch import cli
from mismatch.errors import MismatchError
from mismatch.forward.paired_sites import stream
from mismatch.runs.batch_size import BatchSize, is_memory
from mismatch.runs.folder import load_run
from mismatch.stages.trace import batches

SWAP, MECHANISM = "layer2:infini(segment=16)", "sliding_window(8, 1)"
ASKED = {
    "probes": ("induction", "heads", "position_decoding"),
    "samples": 6,
    "seq_len": 48,
    "controls": (),
}
CHOICE = {"layers": 2, "selection_tokens": 256, "controls": ("zero",), "length": 64, "samples": 6}
STAGES = {
    "trace": (SWAP, {"tokens": 256, "probes": ("induction", "heads"), "controls": ("zero",)}),
    "probe": (SWAP, ASKED),
    "scan": (MECHANISM, {"tokens": 256, "tasks": ("text",), "controls": (), "among": "1,2"}),
    "plan": (MECHANISM, {**CHOICE, "tokens": 128}),
    "plan, greedy": (MECHANISM, {**CHOICE, "tokens": 128, "method": "greedy"}),
    "plan, restore one": (MECHANISM, {**CHOICE, "tokens": 128, "score": "restore_one"}),
    "diagnose": (SWAP, {"tokens": 512, "fit_tokens": 512, "controls": (), "heads": 0}),
}  # fmt: skip
HALVED = {
    "trace": ["in the trace", "in the probe induction"],
    "probe": ["in the probe induction"],
    "scan": ["in the scan"],
    "plan": ["in the scan"],
    "plan, greedy": ["while layers were taken"],
    "plan, restore one": ["while layers were given back"],
    "diagnose": ["in the diagnosis"],
}
"""The piece of each stage that met it; later ones begin with the smaller batch."""
SHORT = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
}  # fmt: skip


def room_for(patch, most: int, error: BaseException = SHORT["torch"]) -> list[int]:
    """Memory for so many windows and no more; the sizes that were tried."""
    tried: list[int] = []
    real = torch.nn.Embedding.forward

    def forward(self, ids):
        tried.append(len(ids))
        if len(ids) > most:
            raise error
        return real(self, ids)

    patch.setattr(torch.nn.Embedding, "forward", forward)
    return tried


def run(teacher, name: str, size: int, **settings):
    what, own = STAGES[name]
    text = {
        "data": documents(8),
        "calibration_data": documents(6, seed=1),
        "calibration_tokens": 256,
    }
    given = {"seq_len": 64, **text, **own, "batch_size": size, **settings}
    return getattr(mismatch, name.split(",")[0])(teacher, what, **given)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("mismatch.stages.runner.write_html", lambda path: None)


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=pytest.mark.slow if one.startswith("plan") else ()) for one in STAGES],
)
def test_the_numbers_are_those_of_the_smaller_batch(
    name, toy_teacher, tmp_path, capsys, monkeypatch
):
    wanted = run(toy_teacher, name, 2).table.drop(columns="run_id")
    tried = room_for(monkeypatch, 2)
    result = run(toy_teacher, name, 8, output=str(tmp_path / "run"), progress=True)
    assert result.table.drop(columns="run_id").equals(wanted)
    assert max(tried) > 2
    manifest = load_run(tmp_path / "run").manifest
    assert manifest["batch_size"] == 2
    assert manifest["out_of_memory"] == [
        f"out of memory {piece}: {rows} windows a batch from here on"
        for piece, most in zip(HALVED[name], (8, 4), strict=False)
        for rows in (4, 2)
        if rows < most
    ]
    assert manifest["out_of_memory"][-1] in capsys.readouterr().err
    assert load_run(tmp_path / "run").config["batch_size"] == 8  # as it was asked for


@pytest.mark.parametrize("error", SHORT.values(), ids=SHORT)
def test_one_window_that_does_not_fit_is_refused(error, toy_teacher, monkeypatch):
    room_for(monkeypatch, 0, error)
    with pytest.raises(MismatchError) as refused:
        run(toy_teacher, "scan", 4)
    assert refused.value.message.startswith("out of memory in the scan, with one window a batch")
    assert all(flag in refused.value.hint for flag in ("--seq-len", "bfloat16", "--device-map"))


def test_a_swap_that_calibrates_takes_the_smaller_batch(toy_teacher, monkeypatch):
    tried = room_for(monkeypatch, 2)
    text = {"calibration_data": documents(6, seed=1), "calibration_tokens": 256, "seq_len": 64}
    student = mismatch.swap(toy_teacher, "layer2:mean", batch_size=4, **text)
    assert (max(tried), student.plan.layers) == (4, (2,))


def test_where_there_is_no_batch_it_is_told_in_words(toy_teacher, monkeypatch):
    def cut(*_args, **_settings):
        raise MemoryError

    monkeypatch.setattr("mismatch.stages.opening.Opened.cut", cut)
    with pytest.raises(MismatchError, match="out of memory in the trace: MemoryError") as refused:
        run(toy_teacher, "trace", 4)
    assert "--batch-size" in refused.value.hint


def test_other_errors_are_no_shortage():
    assert not is_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="shapes"):
        BatchSize(4).run(lambda rows: torch.ones(2, 3) @ torch.ones(rows, 2), "here")


def line(folder, model, output, size: int) -> list[str]:
    """A trace of the same text as a command."""
    held_out = jsonl(folder / "held_out.jsonl", documents(8))
    calibration = jsonl(folder / "calibration.jsonl", documents(6, seed=1))
    return [
        *("trace", "--model", str(model), "--device", "cpu", "--swap", SWAP),
        *("--data", str(held_out), "--calibration-data", str(calibration)),
        *(
            "--seq-len",
            "64",
            "--tokens",
            "512",
            "--batch-size",
            str(size),
            "--output",
            str(output),
            "--controls",
            "zero",
        ),
    ]


def test_a_run_that_is_resumed_begins_with_the_smaller_batch(
    toy_folder, tmp_path, monkeypatch, capsys
):
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert cli.main(line(tmp_path, toy_folder, whole, 2)) == 0
    tried, calls = room_for(monkeypatch, 2), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # of these the first was too large
            signal.raise_signal(signal.SIGINT)
        return stream(*args, **kwargs)

    monkeypatch.setattr(batches, "stream", interrupted)
    assert cli.main(line(tmp_path, toy_folder, half, 4)) == 130
    assert max(tried) == 4
    assert json.loads((half / "manifest.json").read_text())["batch_size"] == 2
    tried.clear()
    assert cli.main(["trace", "--resume", str(half)]) == 0
    assert max(tried) == 2
    assert len(calls) == 1 + 4  # each batch once
    one, other = (load_run(path) for path in (whole, half))
    assert one.table.drop(columns="run_id").equals(other.table.drop(columns="run_id"))
    assert other.manifest["out_of_memory"] == [
        "out of memory in the trace: 2 windows a batch from here on"
    ]


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("command", ["trace", "probe"])
def test_all_ranks_take_the_smaller_batch(command, toy_folder, tmp_path):
    """The second rank alone is short of memory."""
    words = line(tmp_path, toy_folder, tmp_path / "run", 4)
    if command == "probe":
        at = words.index("--tokens")
        words[at : at + 2] = ("--samples", "6", "--probes", "induction,heads,rope_bands")
        words[0] = "probe"
    short = (
        "import os, torch\n"
        "real = torch.nn.Embedding.forward\n"
        "def forward(self, ids):\n"
        "    if len(ids) > 2 and os.environ['RANK'] == '1': raise torch.OutOfMemoryError('planted')\n"
        "    return real(self, ids)\n"
        "torch.nn.Embedding.forward = forward"
    )
    done = finished(start(words, short))
    assert [code for code, _, _ in done] == [0, 0], done
    assert "2 windows a batch from here on" in done[0][2]
    manifest = load_run(tmp_path / "run").manifest
    assert (manifest["batch_size"], manifest["ranks"]) == (2, 2)
    words[words.index("--batch-size") + 1] = "2"
    words[words.index("--output") + 1] = str(tmp_path / "small")
    assert [code for code, _, _ in finished(start(words))] == [0, 0]
    one, other = (load_run(tmp_path / name).table for name in ("run", "small"))
    assert one.drop(columns="run_id").equals(other.drop(columns="run_id"))
