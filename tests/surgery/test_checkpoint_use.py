"""What may be done with a checkpoint: save, train, swap, check and trace it again."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import mismatch
from mismatch.errors import SpecError, SurgeryError, UsageError
from mismatch.models import swap_record as record

IDS = torch.arange(3, 43).reshape(2, 20)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def test_save_pretrained_of_what_was_loaded(saved_toy, swapped_toy, tmp_path, remote_code):
    model = AutoModelForCausalLM.from_pretrained(saved_toy, **remote_code)
    with torch.no_grad():
        model.model.layers[1].self_attn.gate.add_(1.0)
    model.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second", **remote_code)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(swapped_toy.model))
    assert record.read(tmp_path / "second") == record.read(saved_toy)


def test_save_pretrained_of_a_student_is_whole(swapped_toy, tmp_path, remote_code):
    swapped_toy.model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **remote_code)
    assert torch.equal(logits(again), logits(swapped_toy.model))


def test_shards_and_back(saved_toy, swapped_toy, tmp_path):
    model = mismatch.load(saved_toy).model
    model.save_pretrained(tmp_path / "parts", max_shard_size="600KB")
    names = sorted(p.name for p in (tmp_path / "parts").glob("model*.safe*"))
    assert len(names) > 3
    assert names[-1] == "model.safetensors.index.json"
    swapped_toy.tokenizer.save_pretrained(tmp_path / "parts")
    again = mismatch.load(tmp_path / "parts")
    assert torch.equal(logits(again.model), logits(swapped_toy.model))
    again.model.save_pretrained(tmp_path / "parts")
    assert [p.name for p in (tmp_path / "parts").glob("model*.safe*")] == ["model.safetensors"]
    assert torch.equal(logits(mismatch.load(tmp_path / "parts").model), logits(swapped_toy.model))


def test_save_pretrained_refuses_what_it_would_lose(saved_toy, tmp_path):
    model = mismatch.load(saved_toy).model
    with pytest.raises(UsageError, match="does not support `push_to_hub`"):
        model.save_pretrained(tmp_path / "x", push_to_hub=True)
    state = model.state_dict()
    del state["model.layers.1.self_attn.gate"]
    with pytest.raises(
        UsageError, match=r"lacks 1 tensors of this model, first model.layers.1.self_attn.gate"
    ):
        model.save_pretrained(tmp_path / "x", state_dict=state)


def test_trainer(saved_toy, swapped_toy, tmp_path, remote_code):
    """Two steps, one saved on the way; what it saves is a checkpoint, and training goes on from the middle."""
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS.repeat(4, 1).tolist()]

    def trainer(where, **more):
        transformers.set_seed(0)
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path / where), max_steps=2, save_steps=1, report_to="none", use_cpu=True,
            per_device_train_batch_size=2, learning_rate=1e-2, logging_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(saved_toy, **remote_code)
        return transformers.Trainer(
            model, args, train_dataset=rows, processing_class=swapped_toy.tokenizer
        )

    first = trainer("a")
    first.train()
    gate = first.model.model.layers[1].self_attn.gate
    assert not torch.equal(gate, swapped_toy.model.model.layers[1].self_attn.gate)
    first.save_model()
    again = mismatch.load(tmp_path / "a")
    assert torch.equal(logits(again.model), logits(first.model.eval()))
    second = trainer("b")
    second.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-1"))
    assert torch.equal(logits(second.model.eval()), logits(first.model))


def test_lm_evaluation_harness(saved_toy, swapped_toy, remote_code):
    """Log-likelihoods of two continuations of unlike length in one padded batch, against the student's own."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    model = huggingface.HFLM(
        pretrained=str(saved_toy), device="cpu", batch_size=2, dtype="auto", **remote_code
    )
    pairs = [("Once upon a time", " there was a king"), ("The", " end")]
    got = model.loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True
    )
    tokenizer = swapped_toy.tokenizer
    for (context, more), (value, _) in zip(pairs, got, strict=True):
        start = len(tokenizer(context).input_ids)
        ids = torch.tensor([tokenizer(context + more).input_ids])
        steps = logits(swapped_toy.model, ids).log_softmax(-1)[0, start - 1 : -1]
        wanted = steps.gather(-1, ids[0, start:, None]).sum().item()
        assert value == pytest.approx(wanted, abs=1e-4)


def test_swapped_further(saved_toy, swapped_toy, tmp_path):
    loaded = mismatch.load(saved_toy)
    before = logits(loaded.model)
    more = mismatch.swap(loaded, "layer0.mlp:zero", seed=5)
    assert not torch.equal(logits(more.model), before)
    path = mismatch.save_checkpoint(more, tmp_path / "more")
    written = record.read(path)
    assert [swap.seed for swap in written.swaps] == [0, 5]
    assert written.swaps[1].text == "layer0.mlp:zero"
    assert written.base == record.read(saved_toy).base
    again = mismatch.load(path)
    assert torch.equal(logits(again.model), logits(more.model))
    more.undo()
    assert torch.equal(logits(more.model), before)
    assert more.model.swap_record == loaded.model.swap_record


def test_a_place_that_is_taken_cannot_be_taken_again(saved_toy):
    loaded = mismatch.load(saved_toy)
    with pytest.raises(SpecError) as caught:
        mismatch.swap(loaded, "layer1:random")
    assert str(caught.value) == (
        "layer 1 `attn` is replaced twice: by `infini` and `random`\n  layer1:random\n  ^\n\n"
        "hint: one replacement per slot; wrappers such as `parallel` may come on top"
    )
    assert mismatch.swap(loaded, "layer1:zero").plan.layers == (1,)


def test_it_can_be_checked_and_traced(saved_toy, tmp_path):
    text = ["one two three four five six seven eight nine ten. " * 40]
    result = mismatch.trace(
        str(saved_toy),
        swap="layer3:identity",
        data=text,
        tokens=128,
        seq_len=64,
        controls=["zero"],
        dtype="float32",
    )
    table = result.table
    kl = table[(table["metric"] == "kl") & (table["site"] == "logits") & (table["stat"] == "mean")]
    assert kl[kl["student"] == "swap"]["value"].eq(0).all()
    assert kl[kl["student"] == "zero"]["value"].gt(0).all()


def test_a_block_that_was_replaced_as_a_whole_can_be_the_teachers(toy_teacher, tmp_path):
    path = mismatch.swap(toy_teacher, "layer1.block:skip").save(tmp_path / "saved")
    loaded = mismatch.load(path)
    assert loaded.layout.whole_blocks == {1}
    text = ["one two three four five six seven eight nine ten. " * 40]
    result = mismatch.trace(
        loaded, mismatch.swap(loaded, "layer0:zero"), data=text, tokens=64, seq_len=64, controls=[]
    )
    sites = result.table[result.table["layer"] == 1]["site"].unique()
    assert set(sites) == {"resid_pre", "resid_post"}


def test_a_loaded_model_and_a_student_are_teachers_too(swapped_toy, saved_toy, remote_code):
    again = mismatch.load((swapped_toy.model, swapped_toy.tokenizer))
    zero = mismatch.swap(again, "layer3:zero")  # the same tensors, another model
    assert mismatch.load((zero.model, None)).info.sha256 != again.info.sha256
    assert again.model is swapped_toy.model
    model = AutoModelForCausalLM.from_pretrained(saved_toy, **remote_code)
    assert mismatch.swap((model, swapped_toy.tokenizer), "layer3:nope").plan.layers == (3,)


def test_an_undone_student_is_a_plain_model_again(toy_teacher, tmp_path):
    student = mismatch.swap(toy_teacher, "layer1:zero")
    student.undo()
    assert type(student.model) is type(toy_teacher.model)
    student.model.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(plain), logits(toy_teacher.model))
    with pytest.raises(SurgeryError, match="holds no swap that could be saved"):
        student.save(tmp_path / "saved")
    with pytest.raises(SurgeryError, match="nothing is swapped in this LlamaForCausalLM"):
        mismatch.save_checkpoint(toy_teacher, tmp_path / "saved")
