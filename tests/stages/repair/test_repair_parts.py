"""Parts, their store, losses and closed forms on tiny models: sums against scipy, gradients against autograd."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import mismatch
from mismatch.models.layout import Layout
from mismatch.runs.ranks import ALONE
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.ladder import Ladder
from mismatch.stages.repair.ladder_stages import block_window_kl as stream
from mismatch.stages.repair.ladder_stages import closed_form as closed
from mismatch.stages.repair.ladder_stages import local
from mismatch.stages.repair.ladder_stages.activation_store import Store
from mismatch.stages.repair.ladder_stages.budget import LOOKS, Pace, planned
from mismatch.stages.repair.ladder_stages.loss import relative_error, weights
from mismatch.stages.repair.ladder_stages.module_pair import pairs_of, watch
from mismatch.stages.repair.result import some_of
from mismatch.stages.repair.trainable import trainable
from mismatch.surgery.operate import Student


@pytest.fixture
def swapped(tiny: Callable[..., nn.Module]) -> Callable[..., tuple[Layout, Student]]:
    def make(text: str, family: str = "llama") -> tuple[Layout, Student]:
        model = tiny(family)
        student = mismatch.swap((model, None), text)
        return Layout.of(model), student

    return make


def ids(n: int = 4, rows: int = 2, pos: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 101, (rows, pos), generator=generator) for _ in range(n)]


# ---- parts and the store ------------------------------------------------------------------------


@pytest.mark.parametrize("slot", ["attn", "mlp", "norm1", "block"])
def test_a_part_called_alone_gives_what_it_gives_in_the_model(swapped, family, slot):
    layout, student = swapped(f"layer1.{slot}:identity", family)
    (part,) = pairs_of(layout, student)
    batch = ids()[0]
    x, y, call = watch(layout, [part.path], batch, last=1)[part.path]
    assert torch.equal(call(part.student, x), y)
    alone = call(part.student, x[:1])
    # An expert, and the small matrices of gemma4's inputs per layer, round by how many tokens they get.
    rounds = "moe" in family or family == "gemma4_text"
    if rounds and slot in ("mlp", "block"):
        torch.testing.assert_close(alone, y[:1], atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(alone, y[:1])


def test_what_two_paths_share_inside_a_part_stays_shared(swapped):
    _, student = swapped("layer1:parallel(infini(segment=8), alpha=0.5)")
    part = student.model.get_submodule("model.layers.1.self_attn")
    assert part.original.q_proj.weight is part.inner.q_proj.weight


def test_the_store_gives_back_what_the_teacher_did(swapped, tmp_path):
    layout, student = swapped("layer1:infini(segment=8); layer2.mlp:identity")
    parts = pairs_of(layout, student)
    batches = ids()
    live = Store(layout, parts, batches)
    disk = Store(layout, parts, batches, folder=tmp_path, budget=1e9)
    assert disk.fill() == sum(batch.numel() for batch in batches)
    assert disk.fill() == 0
    for part in parts:
        for a, b in zip(live.batches_of(part), disk.batches_of(part), strict=True):
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.y, b.y)


def test_a_budget_that_is_too_small_computes_anew(swapped, tmp_path):
    layout, student = swapped("layer1:infini(segment=8); layer2.mlp:identity")
    parts = pairs_of(layout, student)
    one = Store(layout, parts, ids(), folder=tmp_path, budget=0)
    store = Store(layout, parts, ids(), folder=tmp_path, budget=1.5 * one.bytes_per_module)
    store.fill()
    assert store.stored == parts[:1]
    assert store.needed == 2 * store.bytes_per_module
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(ids())
    assert torch.equal(store.batch(parts[1], 0).y, one.batch(parts[1], 0).y)


# ---- losses -------------------------------------------------------------------------------------


def test_relative_error_is_0_for_a_copy_1_for_nothing_and_no_token_is_the_loss():
    y = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    y[0, 0] *= 1000
    assert relative_error(y, y) == 0
    assert relative_error(torch.zeros_like(y), y) == pytest.approx(1)
    wrong = y.clone()
    wrong[0, 0] = 0
    assert relative_error(wrong, y) < 0.05
    assert (weights(y) > 0).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_end_to_end_loss_and_gradient_are_those_of_the_whole_model(swapped, family):
    layout, student = swapped("layer1:infini(segment=8)", family)
    (part,) = pairs_of(layout, student)
    entering, leaving = stream.block(layout, 1), stream.final(layout)
    batches = ids(2)
    store = Store(layout, [entering, leaving], batches)
    for parameter in part.student.parameters():
        parameter.requires_grad_(True)
    loss = stream.EndToEndLoss(layout, student.layout, store, store, entering, leaving)(1, 2)
    loss.backward()
    got = {n: p.grad.clone() for n, p in part.student.named_parameters()}
    part.student.zero_grad()
    p = layout.model(batches[1]).logits.double().log_softmax(-1)
    q = student.model(batches[1]).logits.double().log_softmax(-1)
    whole = (p.exp() * (p - q)).sum(-1).mean()
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-4)
    for name, parameter in part.student.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-6)


# ---- closed form --------------------------------------------------------------------------------


def test_ridge_is_weighed_least_squares(swapped):
    layout, student = swapped("layer1:infini(segment=8)")
    (part,) = pairs_of(layout, student)
    store = Store(layout, [part], ids(12))
    linear = closed.last_linear(part, store.batch(part, 0))
    assert linear is part.student.o_proj
    with torch.no_grad():
        sums = closed._summed(part, store, linear)
        entering = []
        handle = linear.register_forward_pre_hook(lambda _m, a: entering.append(a[0]))
        examples = list(store.batches_of(part))
        for example in examples:
            example.call(part.student, example.x)
        handle.remove()
    h = torch.cat([e.flatten(0, 1) for e in entering]).double().numpy()
    y = torch.cat([e.y.flatten(0, 1) for e in examples]).double().numpy()
    root = torch.cat([weights(e.y).flatten() for e in examples]).double().sqrt().numpy()[:, None]
    expected, *_ = np.linalg.lstsq(h * root, y * root, rcond=None)
    got = torch.linalg.solve(sums.hh, sums.hy).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-8)
    residual = ((h @ expected - y) * root) ** 2
    assert sums.error(torch.from_numpy(expected)) == pytest.approx(
        residual.sum() / ((y * root) ** 2).sum(), rel=1e-6
    )


def test_gates_find_the_shares_that_a_planted_mixture_has(swapped):
    """The target is the student itself under other gates: the fit must return them."""
    layout, student = swapped("layer1:infini(segment=8)")
    (part,) = pairs_of(layout, student)
    planted = torch.tensor([0.1, 0.3, 0.6, 0.9])
    store = Store(layout, [part], ids(8))

    class Planted(Store):
        def batch(self, part, index):
            example = store.batch(part, index)
            kept = part.student.gate.detach().clone()
            with torch.no_grad():
                part.student.gate.copy_(torch.logit(planted))
                y = example.call(part.student, example.x)
                part.student.gate.copy_(kept)
            return type(example)(example.x, y, example.call)

    with torch.no_grad():
        closed._fit_gates(
            part, list(part.student.gates().values()), Planted(layout, [part], ids(8))
        )
    torch.testing.assert_close(torch.sigmoid(part.student.gate), planted, atol=1e-3, rtol=0)


def test_some_heads_are_one_part_whose_gates_and_projection_are_fitted(swapped):
    """The projection is the attention's own, behind all heads; gates of heads that are not used move nothing."""
    layout, student = swapped("layer1.heads[0,3]:infini(segment=8); layer1.heads[1]:zero")
    (part,) = pairs_of(layout, student)
    store, held = Store(layout, [part], ids(8)), Store(layout, [part], ids(12)[8:])
    assert closed.last_linear(part, store.batch(part, 0)) is part.student.o_proj
    gate = part.student.parts[0].gate
    assert part.student.gates() == {"memory": gate}
    fits = closed.closed_form(part, store, held)
    assert [fit.what for fit in fits] == ["gates", "output projection"]
    assert all(fit.taken for fit in fits)
    with torch.no_grad():
        left = closed._error(part, held)
        gate[1:3] = 3.0
        assert closed._error(part, held) == left == pytest.approx(fits[1].after, rel=1e-3)


# ---- what trains first --------------------------------------------------------------------------

FIRST = "infini(segment=8, normalizer=shared, feature_map=hedgehog)"


@pytest.mark.parametrize("text", [FIRST, f"parallel({FIRST})"])
def test_new_parameters_that_can_give_what_was_replaced_train_alone_first(swapped, text):
    layout, student = swapped(f"layer1:{text}")
    (part,) = pairs_of(layout, student)
    fresh = student.plan.clauses[0].new_parameters
    found = {group.name: group for group in local.groups(part, fresh, 1.0, 7.0)}
    assert [n for n, group in found.items() if group.joins < local.NEVER] == ["gates", "new"]
    assert (found["new"].lr, found["gates"].lr) == (2.0, 7.0)
    names = {name.rpartition(".")[2] for name in found["new"].parameters}
    assert names >= {"gate_x", "map_q", "map_k", "own_q", "own_k"}
    assert {"q_proj", "k_proj"} & {n.split(".")[-2] for n in found["queries"].parameters}


@pytest.mark.parametrize("text", ["infini(segment=8)", "infini(segment=8, feature_map=learned)"])
def test_others_train_what_was_inherited_too(swapped, text):
    layout, student = swapped(f"layer1:{text}")
    (part,) = pairs_of(layout, student)
    fresh = student.plan.clauses[0].new_parameters
    found = local.groups(part, fresh, 1.0, 7.0)
    assert [group.joins for group in found] == [0.0, 0.0, local.VALUES_JOIN, local.QUERIES_JOIN]
    assert {group.lr for group in found if group.name != "gates"} == {1.0}


def test_the_projection_is_not_fitted_before_they_have_learned(swapped):
    layout, student = swapped(f"layer1:{FIRST}")
    (part,) = pairs_of(layout, student)
    store, held = Store(layout, [part], ids(3)), Store(layout, [part], ids(2))
    before = {name: tensor.clone() for name, tensor in part.student.state_dict().items()}
    assert closed.closed_form(part, store, held) == []
    assert all(torch.equal(before[n], t) for n, t in part.student.state_dict().items())


def test_where_the_layer_has_most_to_learn_it_has_most_of_the_time():
    config = RepairConfig(model="glassllm", swap=("layer1:zero",), max_minutes=1.0)
    usual, first = Pace(config), Pace(config, local_longest=True)
    assert usual.share("local") < 0.2 * 60 < 0.6 * 60 < first.share("local") < 0.7 * 60
    assert usual.share("window") == pytest.approx(first.share("window"), rel=1e-2)


def test_notes_of_many_layers_are_said_in_part():
    many = [f"layer{at}.attn: off by 0.{at}2" for at in range(12)]
    other = ["layer3.attn: undone", "left out", "left out"]
    assert some_of([*many, *other]) == [
        *many[:3],
        "9 more like it",
        "layer3.attn: undone",
        "left out",
    ]
    assert some_of(many[:4]) == many[:4]


@pytest.mark.parametrize(
    "mechanism, share",
    [("infini(segment=16)", 0.15), (FIRST, 0.64), ("gated_deltanet", 0.64), ("rwkv", 0.64)],
)
def test_a_mixer_and_new_parameters_that_train_alone_get_most_of_the_time(
    toy_teacher, mechanism, share
):
    """Of 100 minutes, in seconds: a layer that only has its gates to learn keeps the usual part."""
    config = RepairConfig(model="glassllm", swap=(f"layer1:{mechanism}",), max_minutes=100.0)
    student = mismatch.swap(toy_teacher, f"layer1:{mechanism}")
    learner = trainable(toy_teacher.layout, config, student)
    ladder = Ladder(
        config, toy_teacher.layout, learner, judge=None, texts=None, folder=None, state=None,
        fingerprint={}, stopping=bool, say=print,
    )  # fmt: skip
    assert ladder.pace.share("local") == pytest.approx(share * 6000, rel=0.01)


@pytest.mark.parametrize(
    "seconds, batches, steps",
    [
        (float("inf"), 3, 30),  # 10 epochs of the text there is
        (60.0, 3, 80),  # 8 batches were asked for, and time allowed 3: as many steps
        (60.0, 12, 120),
        (0.5, 3, 50),  # what fits
    ],
)
def test_epochs_are_of_the_text_that_was_asked_for(monkeypatch, seconds, batches, steps):
    config = RepairConfig(
        model="m", swap=("layer1:zero",), seq_len=64, batch_size=2, train_tokens=1000
    )
    fitted = []

    def fitting(_loss, _learning, _batches, most: int, seconds: float) -> tuple[int, int]:
        fitted.append(most)
        return min(most, int(100 * seconds)), 3

    monkeypatch.setattr("mismatch.stages.repair.ladder_stages.budget.fitting", fitting)
    loss = type("Loss", (), {"ranks": ALONE})()
    found = planned(loss, [], [torch.zeros(2, 64)] * batches, config, seconds, None, {})
    assert found == (steps, LOOKS if seconds == float("inf") else 3)
    assert bool(fitted) is (seconds != float("inf"))
