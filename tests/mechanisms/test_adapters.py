"""The bottleneck adapters, number by number against their definitions as published, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import FAMILIES, part, swap, tiny, tokens
from torch import nn

IDS = tokens(2, 12)
PUBLISHED = {
    # arXiv 1902.00751, section 2.1: down, nonlinearity, up, and a skip connection inside the adapter.
    "houlsby": lambda out, x, w: out + bottleneck(out, w, gelu),
    # arXiv 2110.04366, table 1: h <- h + s ReLU(x W_down) W_up with x the sublayer's input, s = 4.
    "parallel_adapter": lambda out, x, w: out + 4 * bottleneck(x, w, relu),
    # arXiv 2406.06820: post-adapter, GELU, biases, one learned scale per channel.
    "adapterplus": lambda out, x, w: out + w["scale"] * bottleneck(out, w, gelu),
}
PLACES = [
    (name, slot)
    for name, slots in (
        ("houlsby", ("attn", "mlp")),
        ("parallel_adapter", ("mlp", "attn")),
        ("adapterplus", ("block", "attn", "mlp")),
    )
    for slot in slots
]


def relu(x):
    return torch.where(x > 0, x, 0.0)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def bottleneck(x, w, f):
    down = torch.einsum("btd,rd->btr", x, w["adapter.down.weight"]) + w["adapter.down.bias"]
    return torch.einsum("btr,dr->btd", f(down), w["adapter.up.weight"]) + w["adapter.up.bias"]


def seen(module: nn.Module, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes in and out of a part in one forward of a model."""
    found = []

    def hook(_module, args, kwargs, out):
        given = args[0] if args else kwargs["hidden_states"]
        found.extend([given, out[0] if isinstance(out, tuple) else out])

    handle = module.register_forward_hook(hook, with_kwargs=True)
    model(IDS)
    handle.remove()
    return found[0], found[1]


@pytest.mark.parametrize(("name", "slot"), PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_published_definition(family, name, slot):
    model = tiny(family)
    student = swap(model, f"layer1.{slot}:{name}(reduction=4)")
    mine = part(student, slot=slot)
    new = student.plan.clauses[0].new_parameters
    torch.manual_seed(1)
    with torch.no_grad():
        for weight_name, weight in mine.named_parameters():
            if weight_name in new:
                weight.copy_(0.3 * torch.randn_like(weight))
    original = model.get_submodule(student.layout.slot_path(1, slot))
    x, out = (value.detach().double() for value in seen(original, model))
    w = {n: p.detach().double().requires_grad_() for n, p in mine.named_parameters() if n in new}
    wanted = PUBLISHED[name](out, x, w)
    _, got = seen(mine, student.model)
    assert (wanted - out).abs().max() > 0.1
    torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-4)
    student.model.zero_grad()
    got.pow(2).sum().backward()
    wanted.pow(2).sum().backward()
    for weight_name, weight in mine.named_parameters():
        if weight_name in new:
            theirs = w[weight_name].grad
            assert theirs.abs().max() > 0
            bound = 1e-4 * theirs.abs().max()
            torch.testing.assert_close(weight.grad.double(), theirs, atol=bound, rtol=1e-3)


@pytest.mark.parametrize(
    ("call", "d", "width", "new"),
    [
        ("houlsby", 64, 4, 2 * 64 * 4 + 64 + 4),  # 2md + d + m (Houlsby, section 2.1)
        ("parallel_adapter", 64, 32, 2 * 64 * 32 + 64 + 32),
        ("parallel_adapter(learned_scale=true)", 64, 32, 2 * 64 * 32 + 64 + 32 + 1),
        ("adapterplus", 768, 8, 2 * 768 * 8 + 768 + 8 + 768),
        ("adapterplus", 64, 1, 2 * 64 + 64 + 1 + 64),  # never narrower than 1
        ("houlsby(reduction=0.5)", 64, 128, 2 * 64 * 128 + 64 + 128),
    ],
)
def test_sizes_as_published(call, d, width, new):
    model = tiny("llama", hidden_size=d)
    slot = "block" if call.startswith("adapterplus") else "mlp"
    student = swap(model, f"layer1.{slot}:{call}")
    assert part(student, slot=slot).adapter.down.weight.shape == (width, d)
    clause = student.plan.clauses[0]
    assert sum(clause.new_parameters.values()) == new
    assert clause.dropped == {}


@pytest.mark.parametrize("name", ["houlsby", "adapterplus"])
def test_houlsbys_start_is_a_narrow_normal_cut_at_two_deviations(name):
    model = tiny("llama", hidden_size=256)
    for init in ("zero", "houlsby"):
        adapter = part(
            swap(model, f"layer1.mlp:{name}(reduction=1, init={init})"), slot="mlp"
        ).adapter
        drawn = [adapter.down] if init == "zero" else [adapter.down, adapter.up]
        for layer in drawn:
            assert 0.0195 < layer.weight.abs().max() <= 0.02
            # of a normal cut at 2: std = 0.8796 of it
            assert abs(layer.weight.std() / 0.008796 - 1) < 0.02
            assert abs(layer.weight.mean()) < 1e-4
        assert adapter.down.bias.abs().max() == adapter.up.bias.abs().max() == 0
        assert (adapter.up.weight.abs().max() == 0) == (init == "zero")
    assert not torch.equal(adapter.down.weight, adapter.up.weight)


def test_the_parallel_adapter_starts_as_lora_does():
    adapter = part(
        swap(tiny("llama", hidden_size=256), "layer1:parallel_adapter"), slot="mlp"
    ).adapter
    bound = 1 / math.sqrt(256)
    assert 0.99 * bound < adapter.down.weight.abs().max() <= bound
    assert abs(adapter.down.weight.std() / (bound / math.sqrt(3)) - 1) < 0.02
    for zero in (adapter.down.bias, adapter.up.weight, adapter.up.bias):
        assert zero.abs().max() == 0


@pytest.mark.parametrize(
    ("nonlinearity", "f"),
    [
        ("gelu", gelu),
        ("relu", relu),
        ("swish", lambda x: x / (1 + torch.exp(-x))),
        ("tanh", torch.tanh),
        ("none", lambda x: x),
    ],
)
@pytest.mark.parametrize("name", ["houlsby", "parallel_adapter", "adapterplus"])
def test_nonlinearities(name, nonlinearity, f):
    student = swap(tiny("llama"), f"layer1.mlp:{name}(reduction=4, nonlinearity={nonlinearity})")
    adapter = part(student, slot="mlp").adapter
    torch.manual_seed(0)
    with torch.no_grad():
        adapter.up.weight.normal_()
        adapter.down.weight.normal_()
    w = {f"adapter.{n}": p.detach() for n, p in adapter.named_parameters()}
    x = torch.randn(2, 3, 24)
    torch.testing.assert_close(adapter(x), bottleneck(x, w, f), atol=1e-5, rtol=1e-5)


def test_a_learned_scale_starts_where_it_is_told_and_trains():
    student = swap(tiny("llama"), "layer1:parallel_adapter(scale=2, learned_scale=true)")
    mine = part(student, slot="mlp")
    assert mine.scale.item() == 2
    with torch.no_grad():
        mine.adapter.up.weight.normal_()
    student.model(IDS).logits.pow(2).mean().backward()
    assert mine.scale.grad.abs() > 0


@pytest.mark.parametrize("name", ["houlsby", "parallel_adapter", "adapterplus"])
def test_draws_depend_on_seed_and_place_only(name):
    model = tiny("llama")

    def down(text, seed=0, layer=1, slot="mlp"):
        return part(swap(model, text, seed), layer, slot).adapter.down.weight

    first = down(f"layer1.mlp:{name}(reduction=4)")
    assert torch.equal(down(f"layer1.mlp:{name}(reduction=4)"), first)
    assert not torch.equal(down(f"layer1.mlp:{name}(reduction=4)", seed=1), first)
    assert not torch.equal(down(f"layer2.mlp:{name}(reduction=4)", layer=2), first)
    assert not torch.equal(down(f"layer1.attn:{name}(reduction=4)", slot="attn"), first)
