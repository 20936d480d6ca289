"""The stage `scores`: what it trains, from how many passes of the teacher, and that it resumes."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from test_repair import SMALL

import mismatch
from mismatch.mechanisms.base import scored_in
from mismatch.models.layout import Layout
from mismatch.runs.state import State
from mismatch.stages.repair.ladder_stages import activation_store
from mismatch.stages.repair.ladder_stages import scores as module
from mismatch.stages.repair.ladder_stages.activation_store import Store
from mismatch.stages.repair.ladder_stages.local import groups
from mismatch.stages.repair.ladder_stages.module_pair import pairs_of

SWAP = "layers[1,2]:kv_slots(segment=8, slots=3)"
ALONE = {**SMALL, "stages": ("scores",), "trace_tokens": 0, "probes": ()}
PATTERN = (
    r"BCE of the scores ([\d.]+) -> ([\d.]+) on validation text, a constant has ([\d.]+); the tenth that scores "
    r"highest holds ([\d.]+) of the far attention \(best ([\d.]+), chance 0.10\)"
)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 80)
    monkeypatch.setattr(module, "TOKENS", 512)


def learned(teacher, swap, batches=8, length=64):
    """The learners of a swap, and a store of random text."""
    student = mismatch.swap(teacher, swap)
    layout = Layout.of(teacher.model)
    parts = pairs_of(layout, student)
    ids = torch.randint(5, 900, (batches, length), generator=torch.Generator().manual_seed(0))
    return list(module._learners(parts)), Store(layout, parts, list(ids[:, None]))


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_all_nets_learn_from_one_pass_of_the_teacher(toy_teacher, monkeypatch, order):
    passes = []
    real = activation_store.watch

    def watch(layout, paths, ids, **more):
        passes.append((layout.model is toy_teacher.model, len(list(paths))))
        return real(layout, paths, ids, **more)

    monkeypatch.setattr(activation_store, "watch", watch)
    result = mismatch.repair(toy_teacher, SWAP, order=order, **ALONE)
    # 2,048 training and 256 validation tokens, four windows of 64 at a time; both parts at once.
    assert passes == [(True, 2)] * (8 + 1)
    assert list(result.stages["stage"]) == ["swap", "scores"]
    assert result.stages["tokens"].tolist() == [0, 2048]
    stage = result.plan.stages[1]
    for note in stage.notes[:2]:
        before, after, constant, found, best = map(float, re.search(PATTERN, note).groups())
        assert before == pytest.approx(0.6931, abs=1e-4)  # log 2: all scores are 0
        assert after < constant < before
        assert 0.12 < found <= best < 1  # a tenth of the tokens by chance holds a tenth
    assert stage.kept and stage.kl < result.plan.stages[0].kl
    assert all(net.out.weight.any() for _, net in scored_in(result.student.model))


def test_nets_are_found_in_heads_and_beside_another_module(toy_teacher):
    swap = "layer1:parallel(kv_slots(segment=8), alpha=0.5); layer2.heads[0]:kv_slots(segment=8)"
    learners, store = learned(toy_teacher, swap)
    assert [learner.name for learner in learners] == ["layer1.attn", "layer2.attn"]
    for learner in learners:
        x, y = module.examples(learner, store)
        # Of 64 tokens the last two segments are far from none, and the first is the sink.
        assert x.shape == (8 * 47, 128) and y.shape == (8 * 47, learner.mechanism.n_kv_heads)
        assert y.min() >= 0 and 0 < y.mean() < y.max() <= 1


def test_without_learned_scores_there_is_no_such_stage(toy_teacher):
    for swap, stages in (
        ("layer1:kv_slots(slot_score=value_norm)", ("local",)),
        ("layer1:infini", ("local",)),
        (SWAP, ("scores", "local")),
    ):
        parts, lines = pairs_of(Layout.of(toy_teacher.model), mismatch.swap(toy_teacher, swap)), []
        config = SimpleNamespace(stages=("scores", "slots", "local"), state_bytes=None)
        ladder = SimpleNamespace(config=config, parts=parts, say=lines.append)
        assert module.asked(ladder) == stages
        said = ["no part has learned scores: there is no stage `scores`"]
        assert lines == (said if stages == ("local",) else [])


def test_later_stages_leave_the_nets_alone(toy_teacher):
    """No gradient reaches them there, and none is missed."""
    student = mismatch.swap(toy_teacher, "layer1:kv_slots")
    (part,) = pairs_of(Layout.of(toy_teacher.model), student)
    trained = [n for group in groups(part, [], 1.0, 1.0) for n in group.parameters]
    assert trained and not [name for name in trained if "net" in name]


def test_text_too_short_to_be_far_is_a_note(toy_teacher):
    (learner,), store = learned(toy_teacher, "layer1:kv_slots(segment=32)")
    note = module._once(learner, store, store, 0, None, {})
    assert note.startswith("layer1.attn: no token of a training window is far from a later query")
    assert not learner.net.out.weight.any()


def test_it_takes_the_windows_that_it_needs_and_that_fit(monkeypatch):
    batches = [torch.zeros(4, 64)] * 8
    config = SimpleNamespace(activations_dtype="float32", activations_gb=4.0)
    teacher = SimpleNamespace(d_model=128)
    ladder = SimpleNamespace(texts=SimpleNamespace(train=batches), config=config, teacher=teacher)
    assert module._every(ladder, 2) == 1
    monkeypatch.setattr(module, "ENOUGH", 600)
    assert module._every(ladder, 2) == 4  # 2,048 tokens, of which a fourth is less
    monkeypatch.setattr(module, "ENOUGH", 16_384)
    config.activations_gb = 1100 * 2 * (2 * 128 * 4) / 1e9  # x and y of 1,100 tokens of two parts
    assert module._every(ladder, 2) == 2
    config.activations_gb = 0.0
    assert module._every(ladder, 2) == 8  # one batch is left


def test_a_net_that_is_done_is_not_trained_again(toy_teacher, tmp_path, monkeypatch):
    (learner,), store = learned(toy_teacher, "layer1:kv_slots(segment=8, slots=3)")
    state = State(tmp_path / "scores-0")
    note = module._once(learner, store, store, 0, state, {"seed": 0})
    trained = {name: x.clone() for name, x in learner.net.state_dict().items()}
    assert trained["out.weight"].any()
    (fresh,), _ = learned(toy_teacher, "layer1:kv_slots(segment=8, slots=3)")
    monkeypatch.setattr(module, "_trained", None)
    assert module._once(fresh, store, store, 0, state, {"seed": 0}) == note
    for name, x in fresh.net.state_dict().items():
        assert torch.equal(x, trained[name])


def test_a_net_that_errs_more_is_not_taken():
    """Trained towards the opposite of what the validation text says."""
    net = torch.nn.Linear(4, 2)
    before = {name: x.clone() for name, x in net.state_dict().items()}
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = (net(x) > 0).float()
    judged = module._trained(net, x, 1 - y, x, y, 0)
    assert judged.after > judged.before
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert module._trained(net, x, y, x, y, 0).after < judged.before
    assert not torch.equal(net.weight, before["weight"])


def test_the_share_of_the_best_tenth():
    y = torch.tensor([[0.5, 0.0]] + [[0.05, 0.1]] * 9 + [[0.05, 0.1]] * 10)
    assert module.tenth(y, y) == pytest.approx((0.55 / 1.45 + 0.2 / 1.9) / 2)
    assert module.tenth(-y, y) == pytest.approx((0.1 / 1.45 + 0.1 / 1.9) / 2)
