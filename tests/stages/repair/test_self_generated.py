"""Text sampled from the teacher to train on: drawn from its own distribution, kept, and never the held-out text."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import DynamicCache
from wonderland import documents

import mismatch
from mismatch.cli import main
from mismatch.errors import ConfigError, MismatchError
from mismatch.runs.ranks import ALONE, Ranks
from mismatch.runs.state import State
from mismatch.stages.repair import training_text as module
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.self_generated import Writer, _Draw
from mismatch.stages.repair.training_text import training_text
from mismatch.texts.windows import Source, Windows

SPECIAL = (0, 1, 2)


class Words:
    """A tokenizer of `n` words that puts a prefix before a text."""

    all_special_ids = SPECIAL

    def __init__(self, n: int = 101, prefix: tuple[int, ...] = ()) -> None:
        self.n, self.prefix = n, list(prefix)

    def __len__(self) -> int:
        return self.n

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return SimpleNamespace(input_ids=[*(self.prefix if add_special_tokens else []), 7, 8])


# ---- drawing ------------------------------------------------------------------------------------


def test_words_are_drawn_as_often_as_the_model_says():
    words = torch.tensor([1, 3, 4, 6, 7])
    scores = torch.tensor([9.0, 0.5, 9.0, -1.0, 1.5, 9.0, 0.0, -math.inf])
    rows = 20_000
    draw = _Draw(words, torch.Generator().manual_seed(0), rows, slice(None))
    drawn = draw(None, scores.repeat(rows, 1))
    assert ((drawn == 0).sum(1) == 1).all()
    counts = drawn.argmax(1).bincount(minlength=8).numpy()
    assert counts[[0, 2, 5, 7]].sum() == 0  # not words, or without a chance
    expected = rows * scores[words[:4]].double().softmax(0).numpy()
    assert stats.chisquare(counts[[1, 3, 4, 6]], expected).pvalue > 1e-3


class Quiet(Ranks):
    """A rank that nobody hears."""

    def from_first(self, value):
        return value


def test_ranks_draw_what_one_process_draws(toy_teacher):
    def drawn(ranks: Ranks) -> torch.Tensor:
        writer = Writer(toy_teacher.model, toy_teacher.tokenizer, 64, seed=0, ranks=ranks)
        return writer._drawn(5, 20, 0)

    parts = [drawn(Quiet(rank, 3)) for rank in range(3)]
    assert torch.equal(torch.stack([parts[at % 3][at // 3] for at in range(5)]), drawn(ALONE))
    assert drawn(Quiet(7, 8)).shape == (0, 20)


def test_the_words_follow_the_model(toy_teacher):
    """Of a text that a model draws, the mean NLL is the mean entropy; of any other text it is not."""
    writer = Writer(toy_teacher.model, toy_teacher.tokenizer, 64, seed=0)
    ids = torch.from_numpy(writer.write(8192))
    with torch.no_grad():
        logits = toy_teacher.model(ids).logits[:, :-1, writer.words]
    place = torch.full((int(writer.words.max()) + 1,), -1)
    place[writer.words] = torch.arange(len(writer.words))
    chances = logits.log_softmax(-1)
    nll = -chances.gather(-1, place[ids[:, 1:]].unsqueeze(-1)).squeeze(-1)
    entropy = -(chances.exp() * chances).sum(-1)
    surplus = (nll - entropy).mean(1)  # a martingale difference: windows are independent
    error = surplus.std() / math.sqrt(len(surplus))
    assert abs(surplus.mean()) < 4 * error
    shuffled = ids[:, 1:][:, torch.randperm(63, generator=torch.Generator().manual_seed(0))]
    other = -chances.gather(-1, place[shuffled].unsqueeze(-1)).squeeze(-1)
    assert (other - entropy).mean() > 1


def test_every_family_writes(family, tiny):
    model, before = tiny(family), torch.random.get_rng_state()
    own = model.generation_config

    def write(seed: int) -> np.ndarray:
        return Writer(model, Words(), 40, seed=seed).write(400)

    ids = write(0)
    assert ids.shape == (10, 40)
    assert ids.dtype == np.int64
    assert not np.isin(ids, SPECIAL).any()
    assert ids.max() < 101
    np.testing.assert_array_equal(ids, write(0))
    assert (ids != write(1)).any()
    assert model.generation_config is own
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_cache_with_room_is_the_model_s_own(family, tiny, monkeypatch):
    from mismatch.stages.repair import self_generated as written

    model = tiny(family)
    roomy = Writer(model, Words(), 40, seed=0).write(200)
    monkeypatch.setattr(written, "_roomy", lambda config, _length: DynamicCache(config=config))
    np.testing.assert_array_equal(roomy, Writer(model, Words(), 40, seed=0).write(200))


def test_pieces_fill_windows_and_begin_as_texts_do(tiny, monkeypatch):
    from mismatch.stages.repair import self_generated as written

    monkeypatch.setattr(written, "PIECE", 16)
    writer = Writer(tiny("llama"), Words(prefix=(1,)), 30, seed=0)
    writer.rows = 3
    ids = writer.write(150)
    assert (writer.piece, writer.per_window, writer.rows) == (15, 2, 3)
    assert ids.shape == (5, 30)
    assert (ids[:, [0, 15]] == 1).all()
    assert (np.delete(ids, [0, 15], axis=1) > 2).all()
    assert len(np.unique(ids[:, 1:15], axis=0)) == 5
    odd = Writer(tiny("llama"), Words(), 31, seed=0).write(31)  # two pieces of 16 are cut to fit
    assert odd.shape == (1, 31)


def test_as_many_pieces_stand_side_by_side_as_there_is_room_for(tiny, monkeypatch):
    from mismatch.stages.repair import self_generated as written

    model = tiny("llama")
    shape = model.config
    token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 4  # float32
    piece = 32 * token + written.SCORES * shape.vocab_size
    for room, rows in ((4 * piece, 4), (4 * piece - 1, 3), (1, 1)):
        monkeypatch.setattr(written, "ROOM", room)
        assert Writer(model, Words(), 32, seed=0).rows == rows
    monkeypatch.setattr(written, "ROOM", 4 * piece)
    writer, seen = Writer(model, Words(), 32, seed=0), []
    draw = writer._drawn
    monkeypatch.setattr(
        writer, "_drawn", lambda rows, *more: seen.append(rows) or draw(rows, *more)
    )
    assert writer.write(5 * 32).shape == (5, 32)
    assert seen == [3, 2]  # shared evenly: few side by side cost most


# ---- limits -------------------------------------------------------------------------------------


def test_no_more_is_written_than_there_is_time_for(tiny, monkeypatch):
    """Sampling costs 4 s and 0.1 s a token: of 40 windows time is enough for 20 by a trial of 32 side by side, which
    holds; or for 10, and a trial of these tells that their tokens cost more each."""
    from mismatch.stages.repair import self_generated as written

    said: list[str] = []
    writer = Writer(tiny("llama"), Words(), 32, seed=0, say=said.append)
    now, drawn, trials = [0.0], writer._pieces, []

    def timed(rows: int, length: int, number: int) -> Any:
        if length == written.TRIAL:
            now[0] += 4 + 0.1 * rows * length
            trials.append(rows)
        return drawn(rows, length, number)

    monkeypatch.setattr(written.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(writer, "_pieces", timed)

    def each(rows: int) -> float:
        """Seconds of a window, by a trial of so many."""
        return 32 * written.DEARER * (4 / (rows * written.TRIAL) + 0.1)

    assert len(writer.write(40 * 32, 20.5 * each(32))) == 20
    assert trials == [32]
    assert len(writer.write(40 * 32, 10.5 * each(32))) == int(10.5 * each(32) / each(10)) == 9
    # What each token entails takes its part of the time.
    assert len(writer.write(40 * 32, 40.5 * each(32), beside=each(32) / 32)) == 20
    assert trials == [32, 32, 10, 32]
    assert "640 tokens are sampled from the teacher, to train on" in said
    assert "(for all 1,280 of --self-generated there is no time)" in said
    assert writer.write(320, seconds=0.0).shape == (0, 32)


def test_a_stop_ends_writing(tiny):
    asked = iter([False] * 5 + [True] * 100)
    writer = Writer(tiny("llama"), Words(), 32, seed=0, stopping=lambda: next(asked))
    with pytest.raises(KeyboardInterrupt):
        writer.write(64)


def test_no_memory_halves_what_is_written_side_by_side(tiny, monkeypatch):
    model, said, rows = tiny("llama"), [], []
    generate = model.generate

    def short(ids: torch.Tensor, **told: Any) -> torch.Tensor:
        rows.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("no room")
        return generate(ids, **told)

    monkeypatch.setattr(model, "generate", short)
    ids = Writer(model, Words(), 16, seed=0, say=said.append).write(80)
    assert ids.shape == (5, 16)
    assert rows == [5, 2, 2, 1]
    assert said[1] == "out of memory: 2 pieces side by side from here on"
    monkeypatch.setattr(model, "generate", no_room)
    with pytest.raises(MismatchError, match="out of memory while the teacher is sampled"):
        Writer(model, Words(), 16, seed=0).write(80)
    monkeypatch.setattr(model, "forward", no_room)
    with pytest.raises(MismatchError, match="out of memory while the teacher is sampled"):
        Writer(model, Words(), 16, seed=0)


def no_room(*_args: Any, **_told: Any) -> None:
    raise torch.OutOfMemoryError("no room")


def test_a_share_of_one_is_refused():
    with pytest.raises(ConfigError, match="--self-generated must be less than 1, got 1"):
        RepairConfig(model="m", swap=("layer1:zero",), self_generated=1.0)


# ---- beside the calibration text ----------------------------------------------------------------


def windows(ids: np.ndarray, name: str) -> Windows:
    return Windows(
        ids=ids,
        doc=np.zeros(len(ids), np.int64),
        offset=np.arange(len(ids)),
        scored=np.ones(ids.shape, bool),
        names=(name,),
        asked=ids.size,
        prefix=(),
        source=Source(documents=1),
    )


@pytest.fixture
def asked(toy_teacher) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    config = RepairConfig(
        model="glassllm", swap=("layer1:zero",), train_tokens=1024, seq_len=64, max_minutes=None
    )
    return {
        "config": config,
        "teacher": toy_teacher,
        "read": windows(rng.integers(5, 900, (8, 64)), "text"),
        "held_out": (windows(rng.integers(5, 900, (2, 64)), "held"),),
        "reading": 0.0,
        "stopping": lambda: False,
        "say": lambda _line: None,
    }


def test_what_is_written_stands_behind_the_text_and_is_kept(asked, tmp_path, monkeypatch):
    found = training_text(**asked, state=State(tmp_path / "written"))
    assert (found.read, found.generated, found.repeated) == (512, 512, 0)
    assert found.windows.tokens == 1024
    assert (found.windows.ids[:8] == asked["read"].ids).all()
    assert found.windows.names == ("text", "self-generated")
    assert list(found.windows.doc) == [0] * 8 + [1] * 8
    assert found.lines("sotu")[0].startswith(
        "trained on 512 tokens of sotu and 512 sampled from the teacher in "
    )
    monkeypatch.setattr(module, "Writer", None)  # nobody there to write it again
    again = training_text(**asked, state=State(tmp_path / "written"))
    assert again.windows.fingerprint == found.windows.fingerprint
    assert again.seconds == found.seconds


def test_held_out_text_that_the_model_knows_by_heart_is_left_out(asked):
    first = training_text(**asked, state=None)
    asked["held_out"] = (*asked["held_out"], windows(first.windows.ids[9:11], "famous"))
    found = training_text(**asked, state=None)
    assert (found.generated, found.repeated) == (512 - 128, 128)
    np.testing.assert_array_equal(found.windows.ids, np.delete(first.windows.ids, [9, 10], axis=0))
    assert "128 more repeated held-out text and were left out" in found.lines("sotu")[1]


def test_none_is_written_when_none_is_asked_for(asked, monkeypatch):
    monkeypatch.setattr(module, "Writer", None)
    asked["config"] = dataclasses.replace(asked["config"], self_generated=0.0)
    found = training_text(**asked, state=None)
    assert found.windows is asked["read"]
    assert found.lines("sotu") == ["trained on 512 tokens of sotu"]


def clock(monkeypatch, seconds):
    """Each run of the teacher takes so long."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def run(*_args, **_more):
        now[0] += seconds

    monkeypatch.setattr(module.hooks, "run", run)


@pytest.mark.parametrize(
    "seconds, sampling, read, generated",
    [
        (0.9, 0.0, 512, 512),  # 15 s, a quarter of the minute, are enough for all
        (1.25, 0.0, 384, 384),  # for 12 windows
        (1.25, 17.0, 256, 256),  # of 27 s, which is TEXT of the minute, 10 are left: 8 windows
        (1.25, 40.0, 128, 128),  # sampling took more than it should: 6 s are left, whatever it took
        (3.0, 0.0, 128, 192),
        (999.0, 0.0, 0, 64),
    ],
)
def test_no_more_is_trained_on_than_the_teacher_reads_in_the_time_that_sampling_left(
    asked, tmp_path, monkeypatch, seconds, sampling, read, generated
):
    """Of 16 windows, each of 64 tokens, in a minute; one at least."""
    found = dataclasses.replace(training_text(**asked, state=None), seconds=sampling)
    config = dataclasses.replace(asked["config"], max_minutes=1.0, batch_size=1)
    given = (config, asked["teacher"], asked["read"], 2)
    told: list[str] = []
    clock(monkeypatch, seconds)
    pace = module.reading_pace(*given, state=State(tmp_path))
    assert pace == pytest.approx(seconds / 64)
    less = module.readable(config, found, pace, say=told.append)
    assert (less.read, less.generated) == (read, generated)
    assert less.windows.tokens == read + generated
    assert len(told) == (read + generated < 1024)
    taken = [row.tolist() for row in less.windows.ids]
    assert all(row.tolist() in taken for row in found.windows.ids[: read // 64])
    clock(monkeypatch, 0.001)  # a resumed repair does not ask the clock again
    assert module.reading_pace(*given, state=State(tmp_path)) == pace


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_sampling_leaves_time_to_read_what_it_makes_and_the_text_beside_it(
    asked, monkeypatch, share
):
    """Told to the writer: TEXT of a minute, and of each token the reading of it and of its share of training text."""
    given = []

    class Told:
        def __init__(self, *_args: Any, **_more: Any) -> None:
            pass

        def write(self, tokens: int, seconds: float, beside: float) -> np.ndarray:
            given.append((tokens, seconds, beside))
            return np.zeros((0, 64), np.int64)

    monkeypatch.setattr(module, "Writer", Told)
    changes = {"max_minutes": 1.0, "self_generated": share}
    asked["config"] = dataclasses.replace(asked["config"], **changes)
    training_text(**asked | {"reading": 0.01}, state=None)
    assert given == [(1024 * share, 27.0, pytest.approx(0.01 / share))]


def test_without_a_limit_all_of_the_text_is_taken(asked):
    found = training_text(**asked, state=None)
    config, teacher, read = (asked[name] for name in ("config", "teacher", "read"))
    assert module.reading_pace(config, teacher, read, 2, state=None) == 0.0
    assert module.readable(config, found, 0.0, say=print) is found


def test_a_repair_trains_on_both(toy_teacher):
    result = mismatch.repair(
        toy_teacher,
        "layer2:infini(segment=16)",
        data=documents(12),
        train_data=documents(8, seed=1),
        stages=("closed-form", "local"),
        **{
            "train_tokens": 512,
            "self_generated": 0.25,
            "tokens": 192,
            "val_tokens": 96,
            "seq_len": 48,
            "batch_size": 2,
        },
        **{"max_minutes": None, "epochs": 1, "controls": (), "probes": (), "trace_tokens": 0},
    )
    assert result.plan.stages[1].tokens == (8 + 2) * 48
    note = result.plan.notes[0]
    assert note.startswith("trained on 384 tokens of given texts and 96 sampled from the teacher")
    assert note in result.summary()


# ---- at the terminal ----------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["0.25", "0"])
def test_the_share_is_given_at_the_terminal(share, tmp_path, capsys):
    from killed_repair import SETTINGS
    from wonderland import jsonl

    sizes = ("train_tokens", "tokens", "val_tokens", "seq_len", "batch_size")
    told = [f"--{name.replace('_', '-')}={SETTINGS[name]}" for name in sizes]
    texts = [
        f"--data={jsonl(tmp_path / 'held_out.jsonl', documents(12))}",
        f"--train-data={jsonl(tmp_path / 'train.jsonl', documents(8, seed=1))}",
    ]
    beside = [
        "--controls=none",
        "--probes=none",
        "--trace-tokens=0",
        "--max-minutes=none",
        "--epochs=1",
    ]
    told += [*texts, *beside, f"--output={tmp_path / 'run'}", f"--self-generated={share}"]
    given = ["repair", "--model", "glassllm", "--swap", "layer2:infini(segment=16)"]
    assert main([*given, "--stages", "closed-form", *told]) == 0
    caught = capsys.readouterr()
    wrote = (
        "96 sampled from the teacher" in caught.err and "96 sampled from the teacher" in caught.out
    )
    assert wrote == (share == "0.25")
