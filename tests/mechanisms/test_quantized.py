"""Matrices in few bits: against numpy, with gradients to the input, and what is left as it is."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_qlora import nf4
from tiny_models import DENSE, FAMILIES, part, swap, tiny, tokens
from transformers.pytorch_utils import Conv1D

from mismatch.errors import SpecError, SurgeryError
from mismatch.mechanisms.parts.linears import linear_layers
from mismatch.models.private import same_memory

pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")

IDS = tokens(2, 15)


def rounded(weight: torch.Tensor, form: str) -> np.ndarray:
    """The matrix `out in` that the codes stand for; plain."""
    if form == "nf4":
        levels, scales = nf4(weight)
        return levels * np.repeat(scales, 64)[: levels.size].reshape(levels.shape)
    full = weight.detach().double().numpy()
    step = np.abs(full).max(1, keepdims=True) / 127
    return np.rint(full / step) * step


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize(
    "family, slot",
    [(f, s) for f in FAMILIES for s in ("attn", "mlp") if s == "attn" or f in DENSE],
)
def test_it_is_the_model_with_rounded_matrices(family, slot, form):
    model = tiny(family)
    student = swap(model, f"layer1.{slot}:quantized(format={form}, double=false)")
    twin = copy.deepcopy(model)
    place = twin.get_submodule(student.layout.slot_path(1, slot))
    for layer in linear_layers(place).values():
        turned = isinstance(layer, Conv1D)
        new = rounded(layer.weight.T if turned else layer.weight, form)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(new.T if turned else new))
    ours, theirs = student.model(IDS).logits, twin(IDS).logits
    assert (theirs - model(IDS).logits).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_gradients_pass_to_what_comes_before(form):
    model = tiny("llama").requires_grad_(True)
    student = swap(model, f"layer1:quantized(format={form}, double=false)").model
    twin = copy.deepcopy(model)
    for layer in linear_layers(twin.model.layers[1].self_attn).values():
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(rounded(layer.weight, form)))
    grads = []
    for each in (student, twin):
        each(IDS).logits.square().mean().backward()
        grads.append(each.model.layers[0].mlp.down_proj.weight.grad)
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3)


def test_8_bits_lose_less_than_4():
    model = tiny("llama")
    off = [
        (
            swap(model, f"layer1.block:quantized(format={f})").model(IDS).logits - model(IDS).logits
        ).norm()
        for f in ("int8", "nf4")
    ]
    assert 0 < off[0] < off[1] / 4


def test_8_bits_do_not_ask_bitsandbytes_which_takes_float16_alone_on_a_gpu(monkeypatch):
    """A row of zeros stays zeros; bfloat16 is rounded once, in float32."""
    import bitsandbytes

    monkeypatch.delattr(bitsandbytes.functional, "int8_vectorwise_quant")
    model = tiny("llama").bfloat16()
    old = model.model.layers[1].self_attn.k_proj
    with torch.no_grad():
        old.weight[3] = 0
    new = part(swap(model, "layer1:quantized(format=int8)")).original.k_proj
    full = old.weight.detach().double()
    step = full.abs().amax(1, keepdim=True) / 127
    off = new.codes.double() - full / step.clamp(min=1e-30)
    assert off.abs().max() < 0.5 + 1e-4
    assert not new.weight[3].any()


def test_lora_over_it_is_qlora():
    model = tiny("llama")
    both = swap(model, "layer1:quantized(targets=[q_proj, v_proj]); layer1:lora(r=4)").model
    assert torch.equal(both(IDS).logits, swap(model, "layer1:qlora(r=4)").model(IDS).logits)


def test_what_is_no_target_and_the_biases_stay():
    model = tiny("llama")
    student = swap(model, "layer1:quantized(targets=[k_proj])")
    old, new = model.model.layers[1].self_attn, part(student).original
    assert same_memory(new.q_proj.weight, old.q_proj.weight)
    assert same_memory(new.k_proj.bias, old.k_proj.bias)
    clause = student.plan.clauses[0]
    assert clause.dropped == {"k_proj.weight": 16 * 24}
    assert clause.new_parameters == {}
    size = sum(b.numel() * b.element_size() for b in new.k_proj.buffers())
    assert (
        size == 16 * 24 // 2 + 6 + 4 + 4
    )  # codes, 6 scales in 8 bits, and what these are scaled by


def test_in_some_heads_their_projections_alone_are_rounded():
    model = tiny("llama")
    whole, some = (
        swap(model, f"layer1{heads}:quantized(targets=[q_proj, k_proj, v_proj])").model
        for heads in ("", ".heads[0-3]")
    )
    torch.testing.assert_close(some(IDS).logits, whole(IDS).logits, atol=1e-5, rtol=0)
    half = swap(model, "layer1.heads[0,1]:quantized(format=int8)").model(IDS).logits
    assert (
        0
        < (half - model(IDS).logits).abs().max()
        < (some(IDS).logits - model(IDS).logits).abs().max()
    )


def test_rubbish_is_refused():
    with pytest.raises(SpecError, match="must be one of nf4, int8, got `int3`"):
        swap(tiny("llama"), "layer1:quantized(format=int3)")
    with pytest.raises(SurgeryError, match="LlamaAttention has no linear layer `up_proj`"):
        swap(tiny("llama"), "layer1:quantized(targets=[up_proj])")


def test_without_bitsandbytes_it_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(SurgeryError, match="`quantized` needs bitsandbytes") as error:
        swap(tiny("llama"), "layer1:quantized")
    assert error.value.hint == "pip install 'llm-mismatch[qlora]'"
