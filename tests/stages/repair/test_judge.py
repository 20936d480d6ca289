"""The judge of the ladder: what it asks, what undoes a stage, and where it stays silent."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from asking import Letters, log_softmax, student
from random_models import build
from wonderland import documents

import mismatch
from mismatch.errors import ConfigError, UsageError
from mismatch.forward.heldout import HeldOut
from mismatch.metrics.sums.per_document import PerDocument
from mismatch.models.layout import Layout
from mismatch.runs.intervals import SAMPLES
from mismatch.stages.repair import judge as judging
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.judge import Judge, Judged, selection
from mismatch.stages.repair.ladder import Ladder
from mismatch.stages.repair.ladder_stages.stage_result import StageResult
from mismatch.stages.repair.rows import stage_rows
from mismatch.texts.windows import Source, Windows
from mismatch.texts.wordings import EVALUATION, SELECTION

SEQ_LEN = 480


def windows(count=6):
    ids = np.random.default_rng(3).integers(3, 99, (count, SEQ_LEN))
    return Windows(
        ids=ids, doc=np.arange(count), offset=np.zeros(count, np.int64),
        scored=np.ones(ids.shape, bool), names=tuple(f"d{i}" for i in range(count)),
        asked=ids.size, prefix=(), source=Source(count),
    )  # fmt: skip


def opened(seq_len=SEQ_LEN, tokenizer=None):
    return SimpleNamespace(
        config=SimpleNamespace(seq_len=seq_len, model="tiny", seed=0),
        tokenizer=tokenizer or Letters(),
        model_config=SimpleNamespace(max_position_embeddings=512),
    )


def judge(monkeypatch, model, answered):
    monkeypatch.setattr(judging, "ANSWERED", answered)
    held_out = HeldOut(Layout.of(model), windows(4), 1, 2)
    return Judge(held_out, selection(opened(), windows(), 16))


def test_its_prompts_have_wordings_and_names_of_their_own():
    asked = selection(opened(), windows(), 16)
    assert not asked.why_not and [len(p.ids) for p in asked.prompts] == [4, 4, 8]
    for part in asked.prompts:
        for row in part.ids:
            said = Letters().decode(row)
            assert "access code" in said or "has badge" in said
            assert "magic" not in said and "The number of" not in said
    assert {n.lower() for n in SELECTION.nouns}.isdisjoint(EVALUATION.nouns)


def test_it_is_the_loss_of_a_plain_forward_and_0_for_the_teacher(monkeypatch):
    model = build("llama")
    made = student(model, "layer1:infini(segment=16)")
    found = judge(monkeypatch, model, 1e9)
    assert "on 16 prompts of retrieval that the teacher answers, of 16" in found.note
    assert np.abs(found.evaluate(Layout.of(model)).lost.sums).max() < 1e-9
    read = found.evaluate(made.layout)
    sums, counts = [], []
    for part in selection(opened(), windows(), 16).prompts:
        ids = torch.from_numpy(part.ids)
        plain = -log_softmax(made.model, ids)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        mask = torch.from_numpy(part.scored)[:, 1:]
        sums += (plain * mask).sum(1).tolist()
        counts += mask.sum(1).tolist()
    np.testing.assert_allclose(read.answers.sums, sums, rtol=1e-5)
    assert read.answers.counts.tolist() == counts
    stage = StageResult("local")
    read.into(stage, read)
    assert stage.retrieval == pytest.approx(read.lost.mean().value) and stage.answers == sum(counts)
    rows = {row["stat"]: row for row in stage_rows([stage], 100, "documents")}
    row = rows["answers_minus_teacher[after=local]"]
    assert row["value"] == stage.retrieval and row["over"] == SAMPLES and row["metric"] == "nll"
    assert stage.retrieval_words.startswith("retrieval ")


def test_what_the_teacher_does_not_answer_is_not_asked(monkeypatch):
    model = build("llama")
    everything = judge(monkeypatch, model, 1e9)
    each = everything.teacher.sums / everything.teacher.counts
    some = judge(monkeypatch, model, float(np.sort(each)[9]))
    assert "on 10 prompts" in some.note and len(some.teacher.sums) == 10
    none = judge(monkeypatch, model, float(np.sort(each)[3]))
    assert none.note.endswith("text alone: the teacher answers 4 of 16 prompts of retrieval")
    assert none.evaluate(Layout.of(model)).answers is None
    assert not StageResult("local").retrieval_words


def test_a_model_that_cannot_be_asked_is_judged_on_text(monkeypatch):
    model = build("llama")
    asked = selection(opened(seq_len=100), windows(), 16)
    assert not asked.prompts and "100 tokens has no room" in asked.why_not
    alone = Judge(HeldOut(Layout.of(model), windows(4), 1, 2), asked)
    assert alone.note.startswith("the ladder is judged on text alone: a prompt of needles of 100")


def read(kl, answers):
    """By document, and by prompt; None: retrieval is not judged."""
    text = PerDocument(np.full(4, kl), np.ones(4))
    own = None if answers is None else PerDocument(np.array(answers, float), np.ones(6), SAMPLES)
    return Judged(text, text, own, own)


CALM, WORSE, NOISE = [1, 2, 1, 2, 1, 2], [2, 3.1, 2, 2.9, 2, 3], [1, 2, 1, 2, 1, 9]


@pytest.mark.parametrize(
    ("now", "undone"),
    [
        (read(0.5, CALM), None),
        (read(1.1, CALM), "the held-out KL got worse"),
        (read(0.5, WORSE), "retrieval got worse by 1.00 ["),
        (read(0.5, NOISE), None),  # one prompt of six: the interval holds 0
        (read(0.5, None), None),
        (read(1.1, None), "the held-out KL got worse"),
    ],
)
def test_what_undoes_a_stage(now, undone):
    said = now.worse_than(read(1.0, CALM))
    assert said is None if undone is None else said.startswith(undone)
    assert read(1.0, WORSE).worse_than(read(1.0, None)) is None


def test_a_stage_that_loses_retrieval_is_undone_though_text_got_better(toy_teacher, monkeypatch):
    """The ladder itself, with a judge whose answers get worse by half a nat after each stage."""
    count = iter(range(100))
    real = Judge.evaluate

    def evaluate(self, layout):
        text = real(self, layout)
        lost = PerDocument(np.full(6, 0.5 * next(count)) + np.arange(6) / 100, np.ones(6), SAMPLES)
        return Judged(text.kl, text.nll, lost, lost)

    monkeypatch.setattr(Judge, "evaluate", evaluate)
    weights = []
    monkeypatch.setattr(Ladder, "_set", lambda self, before: weights.append(sorted(before)))
    made = mismatch.repair(
        toy_teacher, "layer2:infini(segment=16)", data=documents(12),
        train_data=documents(8, seed=1), train_tokens=384, tokens=192, val_tokens=96, seq_len=48,
        self_generated=0.0, max_minutes=None, epochs=1, stages=("closed-form",), controls=(),
        probes=(), trace_tokens=0,
    )  # fmt: skip
    inherit, closed = made.plan.stages
    assert closed.kl < inherit.kl and not closed.kept and weights
    assert any("retrieval got worse by 0.50" in note for note in closed.notes)
    assert "retrieval +0.5" in made.words() and "undone" in made.words()
    assert "judged on text alone" in made.words()  # what the toy itself could be asked
    table = made.table
    assert (table["stat"] == "answers_minus_teacher[after=closed-form]").sum() == 1


# ---- the flag -----------------------------------------------------------------------------------


def config(**given):
    return RepairConfig(model="m", swap=("layer1:infini",), **given)


def test_the_share_of_retrieval_text():
    assert config().retrieval_share == 0.25 and config(self_generated=0.0).retrieval_share == 0.25
    assert config(self_generated=0.8).retrieval_share == pytest.approx(0.1)
    assert config(retrieval_text=0.4).retrieval_share == 0.4
    made = config(train_tokens=10_000, seq_len=512, retrieval_text=0.25)
    assert made.to_make == 4 * 512
    assert config(retrieval_text=0.0).to_make == 0
    for wrong in ({"retrieval_text": 0.5}, {"retrieval_text": 1.0, "self_generated": 0.0}):
        with pytest.raises(ConfigError, match="leave no training text"):
            config(**wrong)
    with pytest.raises(ConfigError, match="retrieval_text"):
        config(retrieval_text=-0.1)


def test_what_cannot_be_made_is_left_out_or_refused(toy_teacher):
    given = {
        "data": documents(12), "train_data": documents(8, seed=1), "train_tokens": 384,
        "tokens": 192, "val_tokens": 96, "seq_len": 48, "self_generated": 0.0, "max_minutes": None,
        "stages": ("closed-form",), "controls": (), "probes": (), "trace_tokens": 0,
    }  # fmt: skip
    swap = "layer2:infini(segment=16)"
    with pytest.raises(
        UsageError, match=r"--retrieval-text 0\.25 cannot be made: windows of 48 tok"
    ):
        mismatch.repair(toy_teacher, swap, retrieval_text=0.25, **given)
    plan = mismatch.repair(toy_teacher, swap, **given).plan
    said = [note for note in plan.notes if "retrieval-shaped training text is left out" in note]
    assert said and "nothing stands far back" in said[0]


def test_it_is_mixed_into_the_training_text(toy_teacher, monkeypatch):
    """The toy's context is too short for real ones: windows of any length are allowed here."""
    from mismatch.texts import retrieval

    monkeypatch.setattr(retrieval, "LEAST", 100)
    given = {
        "data": documents(12), "train_data": documents(30, seed=1), "train_tokens": 1280,
        "tokens": 512, "val_tokens": 128, "seq_len": 128, "self_generated": 0.0,
        "max_minutes": None, "stages": ("closed-form",), "controls": (), "probes": (),
        "trace_tokens": 0,
    }  # fmt: skip
    made = mismatch.repair(toy_teacher, "layer2:infini(segment=16)", **given)
    note = made.plan.notes[0]
    assert note == "trained on 1,024 tokens of given texts, 256 retrieval-shaped ones made of it"
    assert "256 tokens of needles, copies and lists, fingerprint " in made.plan.notes[1]
    other = mismatch.repair(toy_teacher, "layer2:infini(segment=16)", **given, retrieval_text=0.0)
    prints = [m.run.manifest["fingerprints"]["training"] for m in (made, other)]
    assert prints[0] != prints[1]
    assert not any("retrieval-shaped" in note for note in other.plan.notes)
