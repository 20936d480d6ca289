"""The training loop on one vector: it keeps the best, resumes to the bit, and says what went wrong silently."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mismatch.runs.state import State
from mismatch.stages.repair.ladder_stages.training import Group, Trainer


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
