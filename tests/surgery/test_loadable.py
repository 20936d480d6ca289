"""What could not be loaded again is refused when it is saved, with a sentence; what peft did in full is saved."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch

from mismatch.errors import SurgeryError
from mismatch.surgery import saving
from mismatch.surgery.loading import MismatchForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "mechanisms"))
from tiny_models import quantised, swap, tiny, tokens

peft = pytest.importorskip("peft")
SWAP = "layer1:infini(segment=8)"
IDS = tokens(2, 12)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def adapted(model, **settings):
    """peft's LoRA around a model, moved off its initial value."""
    config = peft.LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False, **settings)
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)


def refused(model, folder):
    with pytest.raises(SurgeryError) as caught:
        saving.save(model, folder / "saved")
    assert not (folder / "saved").exists()
    return caught.value


def test_adapters_of_peft_inside(tmp_path):
    student = swap(tiny("llama"), SWAP)
    adapted(student.model)
    error = refused(student.model, tmp_path)
    assert str(error).startswith(
        "this model cannot be saved: it holds 9 tensors that its swaps do not make, first "
        "model.layers.0.mlp.down_proj.base_layer.weight, so it could not be loaded again"
    )
    assert "merge what peft put into it (`merge_and_unload`)" in error.hint


def test_adapters_of_the_swap_that_peft_took_out(tmp_path):
    student = swap(tiny("llama"), "layer1.mlp:lora(r=2)")
    for path, layer in list(student.model.named_modules()):
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.merge()
            student.model.set_submodule(path, layer.get_base_layer())
    error = refused(student.model, tmp_path)
    assert "tensors that its swaps do not make, first model.layers.1.mlp.original." in str(error)
    assert "student.merged() makes a plain model" in error.hint


def test_a_tensor_that_was_taken_out(tmp_path):
    student = swap(tiny("llama"), SWAP)
    student.model.model.layers[1].self_attn.register_parameter("gate", None)
    error = refused(student.model, tmp_path)
    assert "lacks 1 tensors that its swaps make, first model.layers.1.self_attn.gate" in str(error)


@pytest.mark.parametrize("done, said", [("merge", "merged"), ("disable", "switched off")])
def test_adapters_that_are_merged_or_off(tmp_path, done, said):
    student = swap(tiny("llama"), "layer1.mlp:lora(r=2)")
    layer = next(m for m in student.model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    layer.merge() if done == "merge" else layer.enable_adapters(False)
    error = refused(student.model, tmp_path)
    assert f"is {said}, and loaded again it would be added to what is there" in str(error)
    assert error.hint.startswith("unmerge it, or switch it on")


def test_shapes_that_the_config_does_not_say(tmp_path):
    student = swap(tiny("llama"), SWAP)
    student.model.resize_token_embeddings(70)
    student.model.config.vocab_size = 61
    error = refused(student.model, tmp_path)
    assert "of another shape than its config says, first lm_head.weight" in str(error)
    assert error.hint == "set the config to what was done to the model"


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_what_peft_merged_is_saved_and_comes_back_to_the_bit(tmp_path, bits):
    """Merged into 4 or 8 bits it is rounded to them, which peft warns of."""
    if bits:
        pytest.importorskip("bitsandbytes")
    teacher = quantised(tmp_path / "plain", bits) if bits else tiny("llama")
    before = logits(teacher)
    student = swap(teacher, SWAP)
    inside = adapted(student.model)
    wanted, plain = logits(inside), logits(swap(teacher, SWAP).model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = inside.merge_and_unload()
    got = logits(merged)
    assert merged is student.model
    off = (wanted - plain).norm()
    assert (got - wanted).norm() < (0.5 if bits else 1e-4) * off
    assert torch.equal(logits(teacher), before)
    saving.save(student.model, tmp_path / "saved")
    again = MismatchForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), got)
