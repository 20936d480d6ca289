"""Stop a run anywhere, go on, and end with the same bytes. Parts of a run merge in any order."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from measured import collector_of, cut, measured, students_of
from wonderland import command

from mismatch import cli
from mismatch.errors import OutputError
from mismatch.forward.paired_sites import stream
from mismatch.models.layout import Layout
from mismatch.runs.ranks import Ranks
from mismatch.runs.state import State
from mismatch.runs.table import as_table, to_parquet
from mismatch.stages.trace import batches as loop
from mismatch.stages.trace.batches import measure

FINGERPRINT = {"settings": "a", "model": "b"}


class Stop(Exception):
    """A process that dies at a batch border."""


@pytest.fixture(scope="module")
def parts(tiny):
    """`fill(state, ...)`: the bytes of the table of one run of 12 windows in 6 batches, cut off where asked."""
    model, windows = tiny("llama"), cut(12)
    students = students_of(model, "layer1:infini(segment=8)", ("zero",))

    def fill(state=None, *, stop_after=None, raises=Stop, fingerprint=FINGERPRINT):
        done = 0

        def progress(count):
            nonlocal done
            done += count
            if stop_after is not None and count and done >= 2 * stop_after:
                raise raises

        collector = collector_of(model, students, windows, sample=0.6)
        measure(
            Layout.of(model), students, collector, windows,
            batch_size=2, state=state, fingerprint=fingerprint, progress=progress,
        )  # fmt: skip
        return to_parquet(as_table([row | {"run_id": "x"} for row in collector.rows()]))

    return fill


@pytest.fixture(scope="module")
def whole(parts):
    return parts()


@pytest.fixture
def saving_always(monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)


@pytest.mark.parametrize(
    "raises, batches", [*((Stop, n) for n in range(1, 7)), (KeyboardInterrupt, 4)]
)
def test_stopped_at_any_border_it_ends_with_the_same_bytes(
    parts, whole, tmp_path, saving_always, batches, raises
):
    state = State(tmp_path / "state")
    with pytest.raises(raises):
        parts(state, stop_after=batches, raises=raises)
    # `progress` raises before the save of its own batch, so that one is lost and done again.
    found = state.load(FINGERPRINT)
    assert (0 if found is None else found[1]["next"]) == batches - 1
    assert parts(state) == whole


def test_stopped_twice(parts, whole, tmp_path, saving_always):
    state = State(tmp_path / "state")
    for batches in (2, 4):
        with pytest.raises(Stop):
            parts(state, stop_after=batches)
    assert state.load(FINGERPRINT)[1]["next"] == 3
    assert parts(state) == whole


def test_ctrl_c_finishes_the_batch_and_saves(parts, whole, tmp_path, monkeypatch):
    """A real signal in the middle of a batch: that batch still counts."""
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return stream(*args, **kwargs)

    state = State(tmp_path / "state")
    monkeypatch.setattr(loop, "stream", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        parts(state)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(calls) == 3
    assert state.load(FINGERPRINT)[1]["next"] == 3
    assert parts(state) == whole
    assert len(calls) == 6


def test_a_second_ctrl_c_stops_at_once(parts, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still here")

    monkeypatch.setattr(loop, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        parts(State(tmp_path / "state"))
    assert State(tmp_path / "state").load(FINGERPRINT) is None


def test_another_fingerprint_is_refused(parts, tmp_path, saving_always):
    state = State(tmp_path / "run" / "state")
    with pytest.raises(Stop):
        parts(state, stop_after=3)
    with pytest.raises(
        OutputError, match="was started with other settings:\n  model: 'b' then, 'c' now"
    ) as caught:
        parts(state, fingerprint=FINGERPRINT | {"model": "c"})
    assert str(tmp_path / "run") + " was" in str(caught.value)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_parts_merge_in_any_order(tiny, order):
    model, windows = tiny("gemma2"), cut(12)
    whole, students = measured(model, "layer1:random", ("zero",), windows=windows)
    filled = []
    for rank in range(3):
        part = collector_of(model, students, windows)
        world = _Alone(rank, 3)
        filled.append(measure(Layout.of(model), students, part, windows, batch_size=2, ranks=world))
    tables = []
    for sequence in (order, sorted(order)):
        total = filled[0].fresh()
        for at in sequence:
            total.merge(total.fresh().load(filled[at].state()))
        tables.append(as_table([row | {"run_id": "test"} for row in total.rows()]))
    table, in_order = tables
    numbers = ["value", "lo", "hi"]
    assert table.drop(columns=numbers).equals(whole.drop(columns=numbers))
    tokens = ~whole["metric"].isin(MOMENTS)
    for column in numbers:
        np.testing.assert_allclose(table[column], in_order[column], rtol=1e-10, atol=1e-12)
        exact = (table[column][tokens], whole[column][tokens])
        np.testing.assert_allclose(*exact, rtol=1e-12, atol=1e-14)
        # Moments are summed in float32 about a pilot mean, which each part draws from its own first batch.
        np.testing.assert_allclose(table[column], whole[column], rtol=1e-6, atol=1e-9)


MOMENTS = (
    "cka",
    "mean_shift",
    "frechet",
    "gaussian_kl",
    "effective_rank",
    "participation_ratio",
    "kurtosis",
)


class _Alone(Ranks):
    """One share of several, without the others."""

    def everywhere(self, value):
        return [value]

    def to_first(self, value):
        return [value]


def trace(words, *more, **options):
    code = (
        "import sys; from mismatch import cli; from mismatch.stages.trace import batches;"
        "batches.SAVE_EVERY = -1.0; sys.exit(cli.main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *words, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, toy_folder):
    folder = tmp_path_factory.mktemp("whole")
    run = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mismatch.stages.runner.write_html", lambda path: None)
        assert cli.main(command(folder, toy_folder, "--output", str(run))) == 0
    return folder, (run / "metrics.parquet").read_bytes()


def wait_for(path: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_process_goes_on(uninterrupted, toy_folder, tmp_path, capsys, monkeypatch, number):
    """Ctrl-C and kill -9 of the real program, as soon as there is something saved."""
    folder, all_bytes = uninterrupted
    run = tmp_path / "run"
    words = command(folder, toy_folder, "--output", str(run))
    process = trace(words)
    wait_for(run / "state" / "state.json", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    manifest = json.loads((run / "manifest.json").read_text())
    assert not (run / "metrics.parquet").exists()
    if number == signal.SIGINT:
        assert process.returncode == 130, err
        assert out == ""
        assert err.endswith(
            f"interrupted; {run} can be resumed\n\nhint: mismatch trace --resume {run}\n"
        )
        assert "Traceback" not in err
        assert manifest["status"] == "interrupted"
    else:
        assert process.returncode == -signal.SIGKILL
        assert manifest["status"] == "running"
    saved = json.loads((run / "state" / "state.json").read_text())["info"]["next"]
    assert 1 <= saved < 6

    # Other settings are refused, and the message says which.
    assert cli.main(["trace", "--resume", str(run), "--tokens", "512", "--seed", "1"]) == 2
    assert capsys.readouterr().err == (
        f"error: the run in {run} was started with other settings:\n"
        "  seed: 0 then, 1 now\n  tokens: 768 then, 512 now\n\n"
        "hint: resume it with the same settings, or start a new run without --resume\n"
    )
    assert cli.main(["trace", "--resume", str(run), "-q", "--tokens", "768"]) == 0
    assert (run / "metrics.parquet").read_bytes() == all_bytes
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["status"], manifest["resumed"]) == ("done", 1)
    assert not (run / "state").exists()
    capsys.readouterr()
    assert cli.main(["trace", "--resume", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"error: the run in {run} is done: there is nothing to resume\n\nhint: read it: mismatch report {run}\n"
    )


def test_stopped_before_anything_was_saved(
    uninterrupted, toy_folder, tmp_path, monkeypatch, capsys
):
    """Ctrl-C while the controls are calibrated: the folder is there, and goes on from the beginning."""
    folder, all_bytes = uninterrupted
    run = tmp_path / "run"

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mismatch.surgery.students.calibrate", interrupt)
        assert cli.main(command(folder, toy_folder, "--output", str(run))) == 130
    assert f"hint: mismatch trace --resume {run}" in capsys.readouterr().err
    assert cli.main(["trace", "--resume", str(run), "-q"]) == 0
    assert (run / "metrics.parquet").read_bytes() == all_bytes


def test_stopped_before_there_is_a_folder(toy_folder, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mismatch.models.load.load", interrupt)
    run = tmp_path / "run"
    assert cli.main(command(tmp_path, toy_folder, "--output", str(run))) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not run.exists()


def test_another_model_under_the_same_name_is_refused(
    uninterrupted, model_folder, tmp_path, capsys, monkeypatch
):
    """The settings are the same; the weights are not."""
    folder, _ = uninterrupted
    model, run = model_folder(), tmp_path / "run"
    words = command(folder, model, "--output", str(run), "--controls", "none")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    with monkeypatch.context() as patch:
        plain = State.save
        patch.setattr(State, "save", lambda *a, **k: (plain(*a, **k), stop()))
        assert cli.main(words) == 130
    settings = json.loads((model / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (model / "config.json").write_text(json.dumps(settings))
    capsys.readouterr()
    assert cli.main(["trace", "--resume", str(run), "-q"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: the run in {run} was started with other settings:\n  model: '")
    assert err.endswith("hint: resume it with the same settings, or give --output another path\n")
    assert yaml.safe_load((run / "config.yaml").read_text())["model"] == str(model)
