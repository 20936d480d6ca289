"""A training lowers the KL, moves what it may move and nothing else, and leaves a checkpoint like any other."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from trainings import SETTINGS, STEPS, SWAP
from wonderland import documents

import mismatch
from mismatch.errors import NumericsError
from mismatch.runs.folder import load_run
from mismatch.stages.train.trainer import mean_kl


@pytest.fixture(scope="module")
def trained(toy_teacher, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("runs") / "run")
    settings = SETTINGS | {"controls": ("zero",)}
    return mismatch.train(toy_teacher, SWAP, output=output, trainer=STEPS, **settings)


def weights(student) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in student.model.state_dict().items()}


def test_the_kl_falls_and_the_numbers_are_those_of_a_trace(trained, toy_teacher):
    plan = trained.plan
    assert [look.step for look in plan.looks] == [0, 4, 8]
    assert [look.tokens for look in plan.looks] == [0, 512, 1024]
    assert plan.looks[-1].kl < 0.8 * plan.looks[0].kl
    options = {"data": SETTINGS["data"], "tokens": 256, "seq_len": 64, "controls": ()}
    traced = mismatch.trace(toy_teacher, trained.checkpoint, metrics=("kl", "rel_l2"), **options)
    rows = traced.table.query(
        "student == 'swap' and mode == 'free' and position == 'all' and stat == 'mean'"
    )
    [kl] = rows.query("metric == 'kl' and site == 'logits'").value
    assert math.isclose(kl, plan.students["trained"].kl[0], rel_tol=1e-5)
    assert math.isclose(kl, plan.looks[-1].kl, rel_tol=1e-5)
    shift = rows.query("metric == 'rel_l2' and site == 'resid_post'").set_index("layer").value
    assert plan.looks[-1].shift[:2] == (0, 0)  # in front of the swap
    assert all(math.isclose(shift[at], plan.looks[-1].shift[at], rel_tol=1e-5) for at in (2, 3))


def test_the_table_holds_the_course_and_the_end(trained):
    table = (
        trained.table.query("metric == 'kl'").set_index(["stage", "step", "student", "stat"]).value
    )
    students = trained.plan.students
    assert table["surgery", 0, "swap", "mean"] == students["swap"].kl[0]
    assert table["train", 4, "swap", "mean"] == trained.plan.looks[1].kl
    assert table["train", 8, "swap", "mean"] == students["trained"].kl[0]
    less = students["trained"].kl[0] - students["zero"].kl[0]
    assert math.isclose(table["train", 8, "swap", "mean_minus_zero"], less)


def test_the_rest_is_frozen_to_the_bit_and_the_swap_that_was_given_too(toy_teacher):
    student = mismatch.swap(toy_teacher, SWAP)
    before, teacher = weights(student), weights(toy_teacher)
    found = mismatch.train(toy_teacher, student, trainer=STEPS, **SETTINGS).student
    after = weights(found)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and all(name.startswith("model.layers.2.self_attn.") for name in moved)
    for same, left in ((weights(student), before), (weights(toy_teacher), teacher)):
        assert all(torch.equal(same[name], left[name]) for name in left)
    assert not any(p.requires_grad or p.grad is not None for p in toy_teacher.model.parameters())


def test_the_checkpoints_load_as_the_model_that_was_trained(trained, toy_teacher):
    ids = torch.arange(40)[None]
    logits = trained.student.model(ids).logits
    last = trained.run_dir / "trainer" / "checkpoint-8"  # of the Trainer
    for path in (trained.checkpoint, last):
        loaded = mismatch.load(path)
        assert torch.equal(loaded.model(ids).logits, logits)
        assert loaded.model.config.use_cache == toy_teacher.model.config.use_cache
        assert loaded.tokenizer.get_vocab() == toy_teacher.tokenizer.get_vocab()
    facts = json.loads((trained.checkpoint / "mismatch.json").read_text())
    assert len(facts["train"]["looks"]) == 3
    assert load_run(trained.run_dir).plan == trained.plan


def test_a_checkpoint_is_trained_on_from_where_it_stands(trained, toy_teacher, tmp_path):
    """Its swap from its record; the first look reads what the last one of its own training read."""
    steps = ["max_steps=2", "learning_rate=1e-4"]
    on = mismatch.train(
        toy_teacher, trained.checkpoint, trainer=steps, output=str(tmp_path / "on"), **SETTINGS
    )
    assert math.isclose(on.plan.looks[0].kl, trained.plan.looks[-1].kl, rel_tol=1e-6)
    assert on.plan.spec == trained.plan.spec
    again = mismatch.load(on.checkpoint)
    ids = torch.arange(40)[None]
    assert torch.equal(again.model(ids).logits, on.student.model(ids).logits)
    assert not torch.equal(again.model(ids).logits, trained.student.model(ids).logits)


def test_a_fine_tune_in_which_nothing_was_swapped(toy_teacher, tmp_path):
    settings = SETTINGS | {"parameters": "all", "trainer": ["max_steps=2", "learning_rate=1e-4"]}
    own = copy.deepcopy(toy_teacher.model)
    found = mismatch.train(
        toy_teacher, (own, toy_teacher.tokenizer), output=str(tmp_path / "run"), **settings
    )
    assert found.plan.looks[0].kl == 0 and found.plan.looks[-1].step == 2
    ids = torch.arange(40)[None]
    loaded = mismatch.load(found.checkpoint)
    assert torch.equal(loaded.model(ids).logits, found.student.model(ids).logits)
    assert all(
        torch.equal(a, b)
        for a, b in zip(own.parameters(), toy_teacher.model.parameters(), strict=True)
    )


def test_settings_of_the_trainer(toy_teacher):
    """Accumulated gradients are those of one batch; mixed precision leaves float32 weights and nothing on the model."""
    steps = ["max_steps=2", "learning_rate=1e-3"]

    def after(*more: str, **other):
        found = mismatch.train(toy_teacher, SWAP, trainer=[*steps, *more], **SETTINGS | other)
        return found.plan.looks[-1], found.student.model

    (look, model), (same, accumulated) = (
        after(),
        after("gradient_accumulation_steps=2", batch_size=1),
    )
    assert look.tokens == same.tokens == 256
    for one, other in zip(model.parameters(), accumulated.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    rough, mixed = after("bf16=true")
    assert 0 < abs(rough.kl - look.kl) < 0.05 * look.kl
    assert mixed.dtype == torch.float32 and "forward" not in vars(mixed)


def test_the_best_checkpoint_is_what_is_reported(toy_teacher, tmp_path):
    """Validation text chooses step 1 of 3; what stands beside it is read at its weights, though no look was due."""
    steps = [
        "max_steps=3",
        "learning_rate=1e-3",
        "eval_strategy=steps",
        "eval_steps=1",
        "save_steps=1",
    ]
    best = [
        "load_best_model_at_end=true",
        "greater_is_better=true",
    ]  # the loss falls: the first one
    found = mismatch.train(
        toy_teacher, SWAP, trainer=[*steps, *best], output=str(tmp_path / "run"), **SETTINGS
    )
    plan, trained = found.plan, found.plan.students["trained"]
    assert plan.step == 1 and [look.step for look in plan.looks] == [0, 1, 3]
    assert math.isclose(plan.kept.kl, trained.kl[0], rel_tol=1e-5)
    assert plan.looks[-1].kl < 0.99 * plan.kept.kl
    assert plan.kept.tokens == 128
    assert any("those of step 1 of 3" in note for note in plan.notes)
    assert "1 steps, 128 tokens" in found.summary()
    rows = found.table.query("stage == 'train' and metric == 'kl' and stat == 'mean'").set_index(
        "step"
    )
    assert rows.value.to_dict() == {0: plan.looks[0].kl, 1: trained.kl[0], 3: plan.looks[-1].kl}


def test_weights_that_are_no_number_are_in_no_checkpoint(toy_teacher, tmp_path):
    """Else a resumed run would go on from them."""
    steps = ["max_steps=2", "learning_rate=inf"]
    with pytest.raises(NumericsError, match="drift/kl is nan after step 2 of the training"):
        mismatch.train(toy_teacher, SWAP, trainer=steps, output=str(tmp_path / "run"), **SETTINGS)
    assert not list((tmp_path / "run" / "trainer").glob("checkpoint-*"))


@pytest.mark.pages
def test_what_is_printed_and_drawn(trained):
    said = trained.summary()
    assert "49.2k parameters trained, 8 steps, 1,024 tokens" in said
    assert (
        f"next: mismatch trace --model {trained.run.manifest['model']} --student {trained.checkpoint} "
        f"--selected-by {trained.run_dir}" in said
    )
    assert trained.as_dict()["students"].keys() == {"swap", "zero", "trained"}
    assert len(trained.curve().axes) == 2


def test_all_parameters_by_cross_entropy(toy_teacher):
    """The text is learnt, the teacher left; a look asks a probe, too."""
    text = documents(1) * 2
    learnt = {**SETTINGS, "train_data": [f"{one} Amen {at}" for at, one in enumerate(text)]}
    found = mismatch.train(
        toy_teacher, SWAP, parameters="all", kl_weight=0, ce_weight=1, probes=("induction",),
        trainer=STEPS, **learnt,
    )  # fmt: skip
    first, *_, last = found.plan.looks
    assert first.shift[0] == 0 < last.shift[0]
    assert all("induction" in name for look in found.plan.looks for name in look.probes)
    assert found.plan.looks[0].probes.keys() == last.probes.keys() != set()
    ids = toy_teacher.tokenizer(text[0], return_tensors="pt").input_ids[:, :64]
    nll = [
        float(one.model(ids, labels=ids).loss.detach())
        for one in (mismatch.swap(toy_teacher, SWAP), found.student)
    ]
    assert nll[1] < nll[0]
    assert last.kl == pytest.approx(found.plan.students["trained"].kl[0], rel=1e-5)


def test_the_loss_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    theirs, ours = (
        torch.randn(2, 300, 11, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    ours.requires_grad_()
    p, q = theirs.softmax(-1), ours.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    (wanted,) = torch.autograd.grad(expected, ours)
    loss = mean_kl(theirs, ours)
    (found,) = torch.autograd.grad(loss, ours)
    assert torch.allclose(loss.double(), expected, rtol=1e-5)
    assert torch.allclose(found, wanted, atol=1e-9)
    assert float(mean_kl(theirs, theirs)) == 0


def test_a_loss_that_is_no_number_ends_the_training(toy_teacher):
    student = copy.deepcopy(mismatch.swap(toy_teacher, SWAP))
    steps = [*STEPS, "max_grad_norm=0"]
    steps[1] = "learning_rate=1e30"
    with pytest.raises(
        NumericsError,
        match=r"(loss|drift/kl|grad_norm) is (nan|inf) after step \d+ of the training",
    ):
        mismatch.train(toy_teacher, student, trainer=steps, **SETTINGS)
