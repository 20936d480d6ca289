"""A swapped model merged into a plain one, which transformers loads by itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mismatch
from mismatch.cli import main
from mismatch.errors import OutputError, SurgeryError
from mismatch.models.quantised import quantised as quantised_layers
from mismatch.models.quantised import settle
from mismatch.registry import mechanisms
from mismatch.surgery import merging

sys.path.insert(0, str(Path(__file__).parents[1] / "mechanisms"))
from tiny_models import quantised, swap, tiny, tokens

IDS = tokens(2, 21)
CALLS = {
    "lora": ("lora", "lora(dora=true)", "lora(init=pissa, targets=all)"),
    "qlora": ("qlora", "qlora(dora=true)"),
    "low_rank_mlp": ("low_rank_mlp(rank=7)",),
    "identity": ("identity",),
    "random": ("random",),
}


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def trained(student):
    """The student with noise on every new tensor."""
    torch.manual_seed(1)
    with torch.no_grad():
        for clause in student.plan.clauses:
            module = student.model.get_submodule(clause.path)
            for name in clause.new_parameters:
                weight = module.get_parameter(name)
                weight.add_(0.1 * torch.randn_like(weight))
    return student


def assert_plain(model, path, wanted, atol=2e-5):
    """The folder loads without mismatch and gives these logits."""
    config = json.loads((path / "config.json").read_text())
    assert "mismatch" not in json.dumps(config)
    again = AutoModelForCausalLM.from_pretrained(path)
    settle(again)
    assert type(again) is type(model)
    torch.testing.assert_close(logits(again), wanted, atol=atol, rtol=0)


def test_every_mechanism_that_says_it_merges_is_tested():
    cards = mechanisms()
    assert CALLS.keys() == {n for n in cards.names() if cards.card(n).facts.get("merges")}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("call", [call for calls in CALLS.values() for call in calls])
def test_the_merged_model_is_the_student_and_loads_without_mismatch(family, call, tmp_path):
    if "qlora" in call:
        pytest.importorskip("bitsandbytes")
    model = tiny(family)
    before = logits(model)
    student = trained(swap(model, f"layer1:{call}"))
    wanted = logits(student.model)
    plain = student.merged()
    assert type(plain) is type(model)
    assert not any(module._forward_pre_hooks for module in plain.modules())
    torch.testing.assert_close(logits(plain), wanted, atol=2e-5, rtol=0)
    plain.save_pretrained(tmp_path)
    assert_plain(model, tmp_path, wanted)
    # Neither the student nor the teacher was touched.
    assert torch.equal(logits(student.model), wanted)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("call", ["lora", "qlora", "low_rank_mlp(rank=7)", "random"])
def test_of_a_quantised_model_what_was_merged_is_in_full(family, call, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = quantised(tmp_path / "base", 4, family)
    student = trained(swap(model, f"layer1:{call}"))
    wanted = logits(student.model)
    merging.save(student.model, tmp_path / "plain")
    assert_plain(model, tmp_path / "plain", wanted)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    changed = {clause.path for clause in student.plan.clauses}
    left = {p for p, _ in quantised_layers(model)} - {p for p, _ in quantised_layers(again)}
    assert left
    assert all(any(path.startswith(one) for one in changed) for path in left)


def test_stacked_and_several(tmp_path):
    text = "layer1:lora; layer1:identity; layer0.block:lora(targets=all); layer2.mlp:low_rank_mlp(rank=9)"
    model = tiny("llama", tie_word_embeddings=True)
    student = trained(swap(model, text))
    wanted = logits(student.model)
    assert merging.save(student.model, tmp_path / "plain") == tmp_path / "plain"
    assert_plain(model, tmp_path / "plain", wanted)


def test_what_cannot_be_merged_is_named():
    student = swap(tiny("llama"), "layer1:lora; layer1.mlp:houlsby; layer2:infini(segment=8)")
    with pytest.raises(SurgeryError) as caught:
        student.merged()
    assert caught.value.message == (
        "`Houlsby` at layer1.mlp, and 1 more: no module of the model's own computes what it computes, so it cannot be "
        "merged"
    )
    assert caught.value.hint == (
        "identity, lora, low_rank_mlp, qlora, random can be; student.save() writes a checkpoint of every mechanism"
    )
    with pytest.raises(SurgeryError, match="nothing is swapped in this LlamaForCausalLM"):
        merging.merged(tiny("llama"))


def test_adapters_that_peft_put_in_are_not_lost():
    from peft import LoraConfig, inject_adapter_in_model

    student = swap(tiny("llama"), "layer1:lora")
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["up_proj"]), student.model.model.layers[0]
    )
    with pytest.raises(SurgeryError) as caught:
        student.merged()
    assert caught.value.message == (
        "4 tensors of this model are not those of a plain LlamaForCausalLM, first "
        "model.layers.0.mlp.up_proj.base_layer.weight"
    )


def test_on_the_command_line_and_into_a_folder_that_is_free(toy_folder, tmp_path, capsys):
    student = trained(mismatch.swap(toy_folder, "layer1:lora"))
    student.save(tmp_path / "checkpoint")
    assert main(["merge", str(tmp_path / "checkpoint"), str(tmp_path / "plain"), "-q"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'plain'}\n"
    assert len({file.stat().st_mode for file in (tmp_path / "plain").iterdir()}) == 1
    plain = mismatch.load(tmp_path / "plain")  # its tokenizer too
    torch.testing.assert_close(logits(plain.model), logits(student.model), atol=2e-5, rtol=0)
    with pytest.raises(OutputError, match="exists and is not empty"):
        mismatch.save_merged(student, tmp_path / "plain")
