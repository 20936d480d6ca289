"""A repair by several ranks: the rows and the weights of one process; one that dies ends the others, and it goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from processes import assert_told_of_the_dead, finished, start
from safetensors.torch import load_file
from wonderland import documents, jsonl

from mismatch import cli
from mismatch.runs.folder import load_run
from mismatch.stages import runner

INFINI = "layer2:infini(segment=16)"
WINDOWS = "layers[1,3]:sliding_window(window=8)"
SLOTS = "layers[1,3]:kv_slots(segment=16, slots=8)"
SMALL = ("--stages", "closed-form,local", "--train-tokens", "384", "--epochs", "1", "--probes", "none",
         "--trace-tokens", "0")  # fmt: skip
TO_THE_END = ("--min-gain", "0", "--train-tokens", "768", "--probes", "induction,generation")


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    monkeypatch.setattr(runner, "write_html", lambda _folder: None)


def words(folder: Path, model: Path, swap: str, *more: str) -> list[str]:
    """`mismatch repair` of the toy; batches of three windows and a last one of less."""
    held_out = jsonl(folder / "held_out.jsonl", documents(12))
    train = jsonl(folder / "train.jsonl", documents(8, seed=1))
    sizes = ("--tokens", "384", "--val-tokens", "192", "--seq-len", "48", "--batch-size", "3")
    rest = (
        "--self-generated",
        "0",
        "--max-minutes",
        "none",
        "--epochs",
        "2",
        "--device",
        "cpu",
        "--quiet",
    )
    text = ("--data", str(held_out), "--train-data", str(train))
    return ["repair", "--model", str(model), "--swap", swap, *text, *sizes, *rest, *more]


def one_process(line: list[str], run: Path) -> Path:
    assert cli.main([*line, "--output", str(run)]) == 0
    return run


def ranks(line: list[str], run: Path, world: int = 2) -> Path:
    done = finished(start([*line, "--output", str(run)], world=world))
    assert [code for code, _, _ in done] == [0] * world, done
    assert done[0][1].splitlines()[-1] == str(run)
    assert [out for _, out, _ in done[1:]] == [""] * (world - 1)  # one voice
    assert load_run(run).manifest["ranks"] == world
    assert not (run / "state").exists()
    return run


def weights(run: Path) -> dict[str, np.ndarray]:
    return {n: t.numpy() for n, t in load_file(run / "checkpoint" / "model.safetensors").items()}


def assert_same(one: Path, several: Path, *, bits: bool = False) -> None:
    """Equal rows and weights: to the bit, or up to the order of additions in every step that was trained."""
    a, b = load_run(one), load_run(several)
    numbers = ["value", "lo", "hi"]
    assert a.table.drop(columns=numbers).equals(b.table.drop(columns=numbers))
    for column in numbers:
        tolerance = {"rtol": 1e-6, "atol": 1e-9} if bits else {"rtol": 1e-3, "atol": 1e-5}
        np.testing.assert_allclose(a.table[column], b.table[column], **tolerance)
    assert [s.name for s in a.plan.stages] == [s.name for s in b.plan.stages]
    for x, y in zip(a.plan.stages, b.plan.stages, strict=True):
        assert (x.kept, x.steps, x.tokens, x.slots) == (y.kept, y.steps, y.tokens, y.slots)
    ours, theirs = weights(several), weights(one)
    assert ours.keys() == theirs.keys()
    worst = max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs)
    assert worst == 0 if bits else worst < 1e-5


def test_two_ranks_repair_one_place(toy_folder, tmp_path):
    line = words(tmp_path, toy_folder, INFINI, *SMALL)
    assert_same(one_process(line, tmp_path / "one"), ranks(line, tmp_path / "two"))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("swap", "more", "bits"),
    [
        (INFINI, TO_THE_END, False),
        (WINDOWS, TO_THE_END, False),
        (WINDOWS, (*TO_THE_END, "--order", "joint"), False),
        (WINDOWS, (*SMALL, "--order", "joint"), True),
        (SLOTS, (*SMALL, "--stages", "scores,slots", "--state-bytes", "40000"), True),
        ("layer2:gated_deltanet", (*SMALL, "--stages", "inherit,closed-form,local"), False),
        (INFINI, (*SMALL, "--trained-controls", "zero", "--stages", "local,block"), False),
    ],
    ids=["the ladder", "in turn", "jointly", "by place", "slots", "inherit", "trained control"],
)
def test_two_ranks_give_what_one_process_gives(swap, more, bits, toy_folder, tmp_path):
    line = words(tmp_path, toy_folder, swap, *more)
    assert_same(one_process(line, tmp_path / "one"), ranks(line, tmp_path / "two"), bits=bits)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_three_ranks(toy_folder, tmp_path):
    """One place, whose batches they share, and two places, of which one rank has none."""
    line = words(tmp_path, toy_folder, INFINI, *SMALL, "--stages", "local,end-to-end")
    assert_same(one_process(line, tmp_path / "one"), ranks(line, tmp_path / "three", 3))
    line = words(tmp_path, toy_folder, WINDOWS, *SMALL, "--order", "joint")
    apart = one_process(line, tmp_path / "apart"), ranks(line, tmp_path / "three apart", 3)
    assert_same(*apart, bits=True)


@pytest.mark.slow
def test_a_limit_in_minutes_is_the_first_ranks(toy_folder, tmp_path):
    """Sampling, reading and steps are timed: all ranks do what fits by the clock of one."""
    more = ("--self-generated", "0.25", "--max-minutes", "0.5", "--train-tokens", "4096")
    line = words(tmp_path, toy_folder, INFINI, *TO_THE_END, *more, "--probes", "none")
    run = load_run(ranks(line, tmp_path / "two"))
    # How many steps fit is the machine's affair; that the ranks agree on it is seen by their going on together.
    assert [stage.name for stage in run.plan.stages][:2] == ["swap", "closed-form"]
    assert any("sampled from the teacher" in note for note in run.plan.notes)


# ---- a rank that dies ---------------------------------------------------------------------------

DIES = """
import os
from mismatch.stages.repair.ladder_stages import training
training.Trainer.__init__.__kwdefaults__["save_every"] = 0.0
real = training.Trainer._step
def step(self, done):
    if os.environ["RANK"] == "1" and done.steps == 2 and self.fingerprint["stage"] == {at!r}:
        {what}
    return real(self, done)
training.Trainer._step = step
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("swap", "more", "at"),
    [(INFINI, (), "local-0"), (WINDOWS, ("--order", "joint"), "local-1")],
    ids=["batches are shared", "places are shared"],
)
def test_a_rank_that_dies_ends_the_run_which_goes_on(swap, more, at, toy_folder, tmp_path):
    line = words(tmp_path, toy_folder, swap, *SMALL, *more)
    run, begun = tmp_path / "run", time.monotonic()
    dies = DIES.format(at=at, what="os._exit(9)")
    done = finished(start([*line, "--output", str(run)], dies))
    assert time.monotonic() - begun < 60
    assert_told_of_the_dead(done, run)
    # It goes on at the step behind the last one that was saved.
    info = json.loads((run / "state" / at / "state.json").read_text())["info"] if not more else {}
    assert info.get("steps", 2) == 2
    done = finished(start(["repair", "--resume", str(run), "-q"]))
    assert [code for code, _, _ in done] == [0, 0], done
    assert_same(one_process(line, tmp_path / "one"), run, bits=bool(more))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rank_that_is_asked_to_stop_stops_all_of_them(toy_folder, tmp_path):
    line = words(tmp_path, toy_folder, INFINI, *SMALL)
    run = tmp_path / "run"
    asked = DIES.format(at="local-0", what="os.kill(os.getpid(), 15)")
    done = finished(start([*line, "--output", str(run)], asked))
    assert [code for code, _, _ in done] == [130, 130], done
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
    state = json.loads((run / "state" / "local-0" / "state.json").read_text())
    assert state["info"]["steps"] == 3
    done = finished(start(["repair", "--resume", str(run), "-q"]))
    assert [code for code, _, _ in done] == [0, 0], done
    assert_same(one_process(line, tmp_path / "one"), run)


def test_another_number_of_ranks_is_refused(toy_folder, tmp_path, monkeypatch, capsys):
    """The state of a run by two ranks is not for one."""
    run = tmp_path / "run"
    line = words(tmp_path, toy_folder, INFINI, *SMALL, "--output", str(run))

    def stop(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mismatch.stages.repair.ladder.Ladder._local", stop)
        assert cli.main(line) == 130
    saved = run / "state" / "state.json"
    state = json.loads(saved.read_text())
    state["fingerprint"]["ranks"] = "2"
    saved.write_text(json.dumps(state))
    capsys.readouterr()
    assert cli.main(["repair", "--resume", str(run), "-q"]) == 2
    assert "  ranks: '2' then, '1' now" in capsys.readouterr().err
