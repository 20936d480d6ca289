"""NF4 by the paper's table, LoRA over it, and a state that any checkpoint can carry."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
from tiny_models import DENSE, FAMILIES, part, swap, tiny, tokens
from transformers.pytorch_utils import Conv1D

from mismatch.errors import SurgeryError
from mismatch.mechanisms.parts.few_bits import NF4Linear
from mismatch.models.private import same_memory

pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")

IDS = tokens(2, 15)
# arXiv 2305.14314, appendix E: the values of NormalFloat 4.
LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def nf4(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The nearest level of each value of its block of 64, and the blocks' scales; plain."""
    flat = weight.detach().double().numpy().ravel()
    scales = np.array([np.abs(flat[i : i + 64]).max() for i in range(0, len(flat), 64)])
    each = np.repeat(scales, 64)[: len(flat)]
    nearest = np.abs((flat / each)[:, None] - LEVELS).argmin(1)
    return LEVELS[nearest].reshape(weight.shape), scales


def base_layers(student, slot="attn"):
    tree = part(student, slot=slot).original
    return {n: m for n, m in tree.named_modules() if isinstance(m, NF4Linear)}


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (7, 9), (64, 64), (24, 32), (5, 96)])
def test_a_value_is_the_nearest_level_times_the_largest_of_its_block(shape):
    torch.manual_seed(0)
    layer = torch.nn.Linear(shape[1], shape[0])
    got = NF4Linear(layer, double=False).weight
    levels, scales = nf4(layer.weight)
    each = np.repeat(scales, 64)[: levels.size].reshape(levels.shape)
    np.testing.assert_allclose(got.numpy(), levels * each, rtol=1e-6, atol=1e-7)


def test_double_quantisation_keeps_the_scales_in_8_bits_around_their_mean():
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 256)
    double, single = NF4Linear(layer, double=True), NF4Linear(layer, double=False)
    levels, scales = nf4(layer.weight)
    each = np.repeat(scales, 64).reshape(levels.shape)
    moving = levels != 0
    ratio = double.weight.numpy()[moving] / levels[moving]  # the scale that came back
    # 256 levels over the spread of the scales: off by less than a hundredth of the largest
    spread = np.abs(scales - scales.mean()).max()
    assert 0 < np.abs(ratio - each[moving]).max() < 0.02 * spread

    def size(module):
        return sum(b.numel() * b.element_size() for b in module.buffers())

    n = layer.weight.numel()
    assert size(single) == n / 2 + 4 * n / 64
    assert size(double) == n / 2 + n / 64 + 4 * n / 64 / 256 + 4


@pytest.mark.parametrize(
    ("family", "slot"),
    [(f, s) for f in FAMILIES for s in ("attn", "mlp", "block") if s != "mlp" or f in DENSE],
)
def test_it_is_the_model_with_rounded_weights_and_lora_merged(family, slot):
    model = tiny(family)
    student = swap(model, f"layer1.{slot}:qlora(r=3, alpha=5)")
    fresh = student.plan.clauses[0].new_parameters
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in part(student, slot=slot).named_parameters():
            if name in fresh:
                weight.add_(0.3 * torch.randn_like(weight))
    twin = copy.deepcopy(model)
    place = twin.get_submodule(student.layout.slot_path(1, slot))
    adapted = part(student, slot=slot).original
    assert base_layers(student, slot)
    for path in base_layers(student, slot):
        path = path.removesuffix(".base_layer")
        layer, target = adapted.get_submodule(path), place.get_submodule(path)
        full = layer.base_layer.weight + 5 / 3 * (
            layer.lora_B.default.weight @ layer.lora_A.default.weight
        )
        with torch.no_grad():
            target.weight.copy_(full.T if isinstance(target, Conv1D) else full)
    torch.testing.assert_close(student.model(IDS).logits, twin(IDS).logits, atol=1e-4, rtol=1e-4)
    # Gradients pass the rounded matrices on their way down: those of the embedding tell.
    for each in (student.model, twin):
        each.zero_grad()
        each(IDS).logits.pow(2).mean().backward()
    ours = student.model.get_input_embeddings().weight.grad
    ours = model.get_input_embeddings().weight.grad if ours is None else ours
    theirs = twin.get_input_embeddings().weight.grad
    torch.testing.assert_close(ours, theirs, atol=1e-4 * theirs.abs().max(), rtol=1e-3)


def test_dora_starts_at_the_lengths_of_the_rounded_rows():
    model = tiny("llama")
    student = swap(model, "layer1:qlora(dora=true)")
    for layer in (part(student).original.q_proj, part(student).original.v_proj):
        lengths = layer.lora_magnitude_vector.default.weight
        torch.testing.assert_close(lengths, layer.base_layer.weight.norm(dim=1))
    plain = swap(model, "layer1:qlora")
    torch.testing.assert_close(student.model(IDS).logits, plain.model(IDS).logits)


def test_the_teachers_tensors_stay_and_the_rounded_ones_do_not_train():
    model = tiny("llama").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = swap(model, "layer1:qlora")
    assert all(torch.equal(model.state_dict()[name], old) for name, old in before.items())
    assert all("lora_" in n for n, p in student.model.named_parameters() if p.requires_grad)
    clause = student.plan.clauses[0]
    assert clause.dropped == {"q_proj.weight": 24 * 32, "v_proj.weight": 24 * 16}
    assert all("lora_" in name for name in clause.new_parameters)
    own = part(student).original.q_proj.base_layer.bias
    assert same_memory(own, model.model.layers[1].self_attn.q_proj.bias)


@pytest.mark.parametrize("double", ["true", "false"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_its_state_is_ordinary_tensors(family, double):
    text = f"layer1:qlora(double={double})"
    model = tiny(family)
    student = swap(model, text).model
    with torch.device("meta"):
        shapes = swap(tiny(family), text).model.state_dict()
    state = student.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in shapes.items()} == {
        k: (v.shape, v.dtype) for k, v in state.items()
    }
    other = swap(tiny(family, seed=3), text).model
    other.load_state_dict(state)
    assert torch.equal(other(IDS).logits, student(IDS).logits)
    with torch.device("meta"):
        empty = swap(tiny(family), text).model
    empty.load_state_dict(state, assign=True)
    names = [n for n in state if "base_layer.packed" in n]
    for name in names:
        path = name.rpartition(".")[0]
        ours, theirs = empty.get_submodule(path).weight, student.get_submodule(path).weight
        assert torch.equal(ours, theirs)


def test_a_cast_of_the_model_does_not_round_the_scales():
    student = swap(tiny("llama"), "layer1:qlora(double=false)")
    base = part(student).original.q_proj.base_layer
    before = base.weight
    student.model.to(torch.bfloat16)
    assert torch.equal(base.weight, before)
    out = student.model(IDS).logits
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_it_names_the_extra_when_bitsandbytes_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SurgeryError) as caught, torch.device("meta"):
        swap(tiny("llama"), "layer1:qlora")
    assert caught.value.message.startswith(
        "layer1.attn: `qlora` needs bitsandbytes, which cannot be imported: "
    )
    assert caught.value.hint == "pip install 'llm-mismatch[qlora]'"
