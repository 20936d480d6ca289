"""A scan stops between any two cells and goes on to the same bytes; ranks take different cells to the same bytes."""

from __future__ import annotations

import json
import signal

import pytest
from measured import cut
from processes import finished, start
from wonderland import documents, jsonl

from mismatch import cli, spec
from mismatch.errors import OutputError
from mismatch.models.layout import Layout
from mismatch.runs.ranks import Ranks
from mismatch.runs.state import State
from mismatch.runs.table import as_table, to_parquet
from mismatch.stages.scan import batches as loop
from mismatch.stages.scan.batches import measure
from mismatch.stages.scan.cells import cells, columns
from mismatch.stages.scan.sums import Sums
from mismatch.stages.scan.sweep import Sweep
from mismatch.stages.scan.tasks import text_task
from mismatch.surgery import operate as surgery

PRINT = {"settings": "a"}


def rendered(sums):
    return to_parquet(as_table([row | {"run_id": "x"} for row in sums.rows({"random": ("zero",)})]))


@pytest.fixture(scope="module")
def parts(tiny):
    """`fill(state, stop)`: the bytes of a scan of 6 cells over 3 batches, cut off after so many runs of a cell."""
    layout = Layout.of(tiny("llama"))
    every = cells(columns(spec.templates("random"), ("zero",)), (0, 1, 2), layout)

    def fill(state=None, *, stop=None, fingerprint=PRINT, ranks=None, ran=None):
        runs = ran if ran is not None else []

        def progress(count):
            runs.extend([1] * count)
            if stop is not None and len(runs) == stop:
                signal.raise_signal(signal.SIGINT)

        sums = measure(
            Sweep(layout, surgery.blank(layout)), every, (text_task(cut()),), batch_tokens=48,
            state=state, fingerprint=fingerprint, progress=progress, **({"ranks": ranks} if ranks else {}),
        )  # fmt: skip
        return sums if ranks else rendered(sums)

    return fill


@pytest.fixture(scope="module")
def whole(parts):
    return parts()


@pytest.fixture(autouse=True)
def one_cell_at_a_time(monkeypatch):
    """The head after every cell, so that there is a border to stop at; saving only when stopped."""
    monkeypatch.setattr("mismatch.stages.scan.sweep.HELD", 1)


@pytest.mark.parametrize("held", [1, 1 << 28])
@pytest.mark.parametrize("stop", [1, 2, 5, 6, 7, 12, 17])
def test_stopped_between_any_two_cells(parts, whole, tmp_path, monkeypatch, stop, held):
    """Also where the final states of all cells fit into memory: none is held back when one asks to stop."""
    monkeypatch.setattr("mismatch.stages.scan.sweep.HELD", held)
    state, again = State(tmp_path / "state"), []
    with pytest.raises(KeyboardInterrupt):
        parts(state, stop=stop)
    assert state.load(PRINT)[1]["next"] == [0, (stop - 1) // 6, (stop - 1) % 6 + 1]
    assert parts(state, ran=again) == whole
    assert len(again) == 18  # those that were done before are told first, and not done again


def test_stopped_twice(parts, whole, tmp_path):
    state = State(tmp_path / "state")
    for stop in (4, 9):
        with pytest.raises(KeyboardInterrupt):
            parts(state, stop=stop)
    assert parts(state) == whole


def test_killed_it_goes_on_from_the_last_save(parts, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    state = State(tmp_path / "state")
    real = State.save

    def dies(self, *args):
        real(self, *args)
        if self._read_index()["count"] == 8:
            raise MemoryError

    monkeypatch.setattr(State, "save", dies)
    with pytest.raises(MemoryError):
        parts(state)
    monkeypatch.setattr(State, "save", real)
    assert state.load(PRINT)[1]["next"] == [0, 1, 2]
    assert parts(state) == whole


def test_it_saves_while_a_batch_runs(parts, whole, tmp_path, monkeypatch):
    """A batch may take minutes: what was run is not held back until its end."""
    monkeypatch.setattr("mismatch.stages.scan.sweep.HELD", 1 << 28)
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    saved, real = [], State.save

    def seen(self, arrays, info, fingerprint):
        saved.append(tuple(info["next"]))
        real(self, arrays, info, fingerprint)

    monkeypatch.setattr(State, "save", seen)
    assert parts(State(tmp_path / "state")) == whole
    assert saved == [(0, batch, cell) for batch in range(3) for cell in range(1, 7)]


def test_other_settings_are_refused(parts, tmp_path):
    state = State(tmp_path / "run" / "state")
    with pytest.raises(KeyboardInterrupt):
        parts(state, stop=3)
    with pytest.raises(OutputError, match="settings: 'a' then, 'b' now"):
        parts(state, fingerprint={"settings": "b"})


@pytest.mark.parametrize("world", [2, 3, 5])
def test_shares_of_the_cells_make_the_whole(parts, whole, world, monkeypatch):
    """Each rank without the others; what it would send them is kept."""
    sent = []
    monkeypatch.setattr(Ranks, "everywhere", lambda self, value: sent.append(value) or [value])
    shares = [parts(ranks=Ranks(rank, world)) for rank in range(world)]
    assert len(sent) == world
    assert not set.intersection(*map(set, sent))  # each cell is one rank's
    total = Sums(shares[0].cells, shares[0].tasks)
    assert len(total.cells) == 6
    for part in sent:
        total.load(part)
    assert rendered(total) == whole


def command(folder, model, *more):
    held_out = jsonl(folder / "held_out.jsonl", documents(6))
    calibration = jsonl(folder / "calibration.jsonl", documents(3, seed=1))
    return [
        *("scan", "--model", str(model), "--swap", "infini(segment=16); mean", "--device", "cpu"),
        *("--data", str(held_out), "--calibration-data", str(calibration), "--calibration-tokens", "256"),
        *("--tokens", "384", "--seq-len", "64", "--batch-size", "2", "--samples", "2", "--quiet"),
        *("--among", "1-3", *more),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, toy_folder):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mismatch.stages.runner.write_html", lambda path: None)
        assert cli.main(command(folder, toy_folder, "--output", str(folder / "run"))) == 0
    return folder, (folder / "run" / "metrics.parquet").read_bytes()


def test_the_command_is_stopped_and_goes_on(
    uninterrupted, toy_folder, tmp_path, capsys, monkeypatch
):
    folder, all_bytes = uninterrupted
    run = tmp_path / "run"
    real, calls = loop.Sweep.run, []

    def stopped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Sweep, "run", stopped)
        assert cli.main(command(folder, toy_folder, "--output", str(run))) == 130
    err = capsys.readouterr().err
    assert err.endswith(
        f"interrupted; {run} can be resumed\n\nhint: mismatch scan --resume {run}\n"
    )
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["status"], manifest["kind"]) == ("interrupted", "scan")
    assert json.loads((run / "state" / "state.json").read_text())["info"]["next"] == [0, 1, 1]
    # Other settings are refused before anything is loaded, and so is another command.
    assert cli.main(["scan", "--resume", str(run), "--among", "0-3"]) == 2
    assert "  among: '1-3' then, '0-3' now" in capsys.readouterr().err
    assert cli.main(["trace", "--resume", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"error: the run in {run} was made by `mismatch scan`\n\nhint: mismatch scan --resume {run}\n"
    )
    assert cli.main(["scan", "--resume", str(run), "-q"]) == 0
    assert (run / "metrics.parquet").read_bytes() == all_bytes
    assert not (run / "state").exists()
    assert capsys.readouterr().out.splitlines()[-1] == str(run)


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(uninterrupted, toy_folder, tmp_path):
    folder, all_bytes = uninterrupted
    run = tmp_path / "two"
    done = finished(start(command(folder, toy_folder, "--output", str(run))))
    assert [code for code, _, _ in done] == [0, 0], done
    assert done[0][1].splitlines()[-1] == str(run)
    assert done[1][1] == ""
    assert (run / "metrics.parquet").read_bytes() == all_bytes
    manifest = json.loads((run / "manifest.json").read_text())
    alone = json.loads((folder / "run" / "manifest.json").read_text())
    assert (manifest["status"], manifest["ranks"]) == ("done", 2)
    # Every rank needs the teacher; the cells are shared.
    extra = manifest["work"]["block_tokens"] - alone["work"]["block_tokens"]
    assert extra == alone["work"]["tokens"] * alone_layers(folder)


def alone_layers(folder):
    return json.loads((folder / "run" / "plan.json").read_text())["n_layers"]


def test_more_processes_than_cells(toy_folder, tmp_path, monkeypatch, capsys):
    from contextlib import nullcontext

    monkeypatch.setattr("mismatch.stages.runner.joined", lambda device: nullcontext(Ranks(0, 9)))
    monkeypatch.setattr(Ranks, "everywhere", lambda self, value: [value])
    assert (
        cli.main(command(tmp_path, toy_folder, "--among", "1", "--output", str(tmp_path / "r")))
        == 2
    )
    assert capsys.readouterr().err == (
        "error: 9 processes for 3 cells: some would have none\n\n"
        "hint: start fewer, or scan more layers\n"
    )
    assert not (tmp_path / "r").exists()
