"""A watcher in anyone's training: its numbers are right, and the training does not notice it."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from wonderland import documents

import mismatch

SWAP = "layer2:infini(segment=16)"


@pytest.fixture(scope="module")
def text(toy_teacher):
    return mismatch.windows(
        mismatch.read_documents(documents(4)), toy_teacher.tokenizer, seq_len=64, tokens=320
    )


def trainer_of(teacher, folder, swap: str = SWAP) -> transformers.Trainer:
    """Somebody's training: all weights, the text itself, dropout in the attentions that stayed."""
    student = mismatch.swap(teacher, swap)
    for module in student.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    cut = mismatch.windows(
        mismatch.read_documents(documents(4, seed=1)), teacher.tokenizer, seq_len=64, tokens=768
    )
    rows = [{"input_ids": row, "labels": row} for row in cut.ids]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
        logging_steps=3, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = student.model.requires_grad_(True)
    made = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    made.remove_callback(transformers.PrinterCallback)
    return made


def test_the_training_does_not_notice(toy_teacher, text, tmp_path):
    ended = []
    for watched in (True, False):
        trainer = trainer_of(toy_teacher, tmp_path)
        if watched:
            trainer.add_callback(mismatch.DriftCallback(trainer, toy_teacher, text, every=2))
        trainer.train()
        logs = trainer.state.log_history
        ended.append(
            (trainer.model.state_dict(), [e["loss"] for e in logs if "loss" in e], torch.rand(1))
        )
        looks = [entry["step"] for entry in logs if "drift/kl" in entry]
        assert looks == ([0, 2, 4, 6] if watched else [])
    (one, losses, drawn), (other, same, again) = ended
    assert losses == same and len(losses) == 2  # none is lost where a look falls on a log
    assert torch.equal(drawn, again)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_modes_gradients_and_random_state_stay(toy_teacher, text, tmp_path):
    trainer = trainer_of(toy_teacher, tmp_path)
    model = trainer.model.train()
    model.model.layers[1].eval()  # as with a frozen part
    ids = torch.arange(32)[None]
    model(ids, labels=ids).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes = [module.training for one in (model, toy_teacher.model) for module in one.modules()]
    state = torch.get_rng_state()
    mismatch.DriftCallback(trainer, toy_teacher, text).readings()
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [m.training for one in (model, toy_teacher.model) for m in one.modules()]
    after = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == after.keys() and len(grads) > 30
    assert all(torch.equal(after[name], grads[name]) for name in grads)


def test_the_numbers_are_those_of_held_out_text(toy_teacher, text, tmp_path):
    """Windows in batches of 2, the last of one; logits of the whole vocabulary as the reference."""
    trainer = trainer_of(toy_teacher, tmp_path)
    found = mismatch.DriftCallback(trainer, toy_teacher, text, batch_size=2).readings()
    layout = mismatch.layout_of(trainer.model)
    expected = mismatch.HeldOut(toy_teacher.layout, text, first=0).evaluate(layout)
    assert math.isclose(found["drift/kl"], expected.kl.mean().value, rel_tol=1e-5)
    assert math.isclose(found["drift/nll"], expected.nll.mean().value, rel_tol=1e-4, abs_tol=1e-6)
    ids = torch.from_numpy(text.ids)
    with torch.no_grad():
        theirs, ours = (
            one.eval()(ids, output_hidden_states=True).hidden_states[3]
            for one in (toy_teacher.model, trainer.model)
        )
    ratio = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).mean()
    assert math.isclose(found["drift/rel_l2_layer_02"], float(ratio), rel_tol=1e-5)
    assert len(found) == 2 + toy_teacher.layout.n_layers


def test_a_student_equal_to_its_teacher_reads_nothing(toy_teacher, text, tmp_path):
    trainer = trainer_of(toy_teacher, tmp_path, "layer2:identity")
    found = mismatch.DriftCallback(trainer, toy_teacher, text).readings()
    assert set(found.values()) == {0.0}
