"""LoRA, rsLoRA, DoRA, PiSSA, OLoRA: against weights merged by hand, and against peft's own surgery."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from peft.tuners.lora import Linear
from tiny_models import DENSE, FAMILIES, in_chunks, part, swap, tiny, tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

from mismatch.errors import SurgeryError
from mismatch.models.private import same_memory

IDS = tokens(2, 15)
SOME = ("llama", "phi3", "gpt2", "gpt_neox")


def adapters(student, slot="attn"):
    """peft's layers by their path in the part."""
    tree = part(student, slot=slot).original
    return {name: m for name, m in tree.named_modules() if isinstance(m, Linear)}


def draw(student, slot="attn"):
    """Random values in every new tensor, so that nothing hides behind a zero."""
    fresh = student.plan.clauses[0].new_parameters
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in part(student, slot=slot).named_parameters():
            if name in fresh:
                weight.add_(0.3 * torch.randn_like(weight))


def merged(model, student, slot, *, scale, dora=False):
    """A copy of the teacher whose targets hold the weight that LoRA means.

    Also hands out A, B and m by path: leaves of the copy's graph, equal to the student's.
    """
    twin = copy.deepcopy(model)
    place = student.layout.slot_path(1, slot)
    leaves = {}
    for path, layer in adapters(student, slot).items():
        a, b = (
            w.default.weight.detach().clone().requires_grad_() for w in (layer.lora_A, layer.lora_B)
        )
        target = twin.get_submodule(f"{place}.{path}")
        turned = isinstance(target, Conv1D)
        weight = target.weight.detach()
        full = (weight.T if turned else weight) + scale * b @ a
        leaves |= {f"{path}.lora_A": a, f"{path}.lora_B": b}
        if dora:
            m = layer.lora_magnitude_vector.default.weight.detach().clone().requires_grad_()
            leaves[f"{path}.lora_magnitude_vector"] = m
            # The length counts as a constant for the gradient (DoRA, section 4.3).
            full = m[:, None] * full / full.detach().norm(dim=1, keepdim=True)
        del target.weight
        target.weight = full.T if turned else full
    return twin, leaves


@pytest.mark.parametrize(
    ("family", "slot"),
    [(f, s) for f in FAMILIES for s in ("attn", "mlp", "block") if s != "mlp" or f in DENSE],
)
def test_it_is_the_model_with_merged_weights_in_outputs_and_gradients(family, slot):
    model = tiny(family)
    student = swap(model, f"layer1.{slot}:lora(r=3, alpha=5)")
    draw(student, slot)
    twin, leaves = merged(model, student, slot, scale=5 / 3)
    ours, theirs = student.model(IDS).logits, twin(IDS).logits
    assert (theirs - model(IDS).logits).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    ours.pow(2).mean().backward()
    theirs.pow(2).mean().backward()
    check_gradients(student, slot, leaves)


def check_gradients(student, slot, leaves):
    new = dict(part(student, slot=slot).original.named_parameters())
    for name, leaf in leaves.items():
        got = new[f"{name}.default.weight"].grad
        assert leaf.grad.abs().max() > 0
        torch.testing.assert_close(got, leaf.grad, atol=1e-4 * leaf.grad.abs().max(), rtol=1e-3)


@pytest.mark.parametrize("family", SOME)
def test_dora_trains_the_lengths_apart_from_the_directions(family):
    model = tiny(family)
    student = swap(model, "layer1:lora(r=3, alpha=5, dora=true)")
    for path, layer in adapters(student).items():
        weight = layer.base_layer.weight
        weight = weight.T if isinstance(layer.base_layer, Conv1D) else weight
        lengths = layer.lora_magnitude_vector.default.weight
        torch.testing.assert_close(lengths, weight.norm(dim=1), msg=path)
    draw(student)
    twin, leaves = merged(model, student, "attn", scale=5 / 3, dora=True)
    ours, theirs = student.model(IDS).logits, twin(IDS).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    ours.pow(2).mean().backward()
    theirs.pow(2).mean().backward()
    check_gradients(student, "attn", leaves)


def test_rslora_divides_by_the_root_of_the_rank():
    model = tiny("llama")
    student = swap(model, "layer1:lora(r=3, alpha=5, rslora=true)")
    draw(student)
    twin, _ = merged(model, student, "attn", scale=5 / math.sqrt(3))
    torch.testing.assert_close(student.model(IDS).logits, twin(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_it_is_what_get_peft_model_makes_of_one_layer(options):
    model = tiny("llama")
    settings = "".join(f", {name.removeprefix('use_')}=true" for name in options)
    student = swap(model, f"layer1:lora(r=3, alpha=5{settings})")
    draw(student)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[1],
        layers_pattern="layers",
        **options,
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    place = theirs.base_model.model.model.layers[1].self_attn
    new = {n: p for n, p in part(student).original.named_parameters() if "lora_" in n}
    assert place.load_state_dict(new, strict=False).unexpected_keys == []
    assert new.keys() == {n for n, _ in place.named_parameters() if "lora_" in n}
    assert torch.equal(student.model(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize(
    ("family", "slot", "found"),
    [
        ("llama", "attn", ["q_proj", "v_proj"]),
        ("phi3", "attn", ["qkv_proj"]),
        ("gpt_neox", "attn", ["query_key_value"]),
        ("gpt2", "attn", ["c_attn"]),
        ("llama", "mlp", ["gate_proj", "up_proj", "down_proj"]),
        ("phi3", "mlp", ["gate_up_proj", "down_proj"]),
        ("gpt2", "mlp", ["c_fc", "c_proj"]),
        ("gpt2", "block", ["attn.c_attn"]),
        ("olmo2", "block", ["self_attn.q_proj", "self_attn.v_proj"]),
    ],
)
def test_what_is_adapted_when_nothing_is_said(family, slot, found):
    assert list(adapters(swap(tiny(family), f"layer1.{slot}:lora"), slot)) == found


@pytest.mark.parametrize("name", ["lora", "qlora", "low_rank_mlp"])
def test_experts_have_no_layer_to_adapt(name):
    with pytest.raises(SurgeryError, match="Qwen3MoeSparseMoeBlock has no linear layer to"):
        swap(tiny("qwen3_moe"), f"layer1.mlp:{name}")


@pytest.mark.parametrize(
    ("slot", "targets", "found"),
    [
        ("attn", "o_proj", ["o_proj"]),
        ("attn", "[k_proj, o_proj]", ["k_proj", "o_proj"]),
        ("attn", "all", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("block", "[self_attn.o_proj, down_proj]", ["self_attn.o_proj", "mlp.down_proj"]),
    ],
)
def test_targets_by_name(slot, targets, found):
    student = swap(tiny("llama"), f"layer1.{slot}:lora(targets={targets})")
    assert list(adapters(student, slot)) == found


def test_a_dotted_target_tells_two_layers_of_one_name_apart():
    model = tiny("gpt2")
    both = adapters(swap(model, "layer1.block:lora(targets=c_proj)"), "block")
    one = adapters(swap(model, "layer1.block:lora(targets=mlp.c_proj)"), "block")
    assert list(both) == ["attn.c_proj", "mlp.c_proj"]
    assert list(one) == ["mlp.c_proj"]


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("family", SOME)
def test_an_init_from_the_weight_splits_it_and_leaves_the_teachers_alone(family, init):
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    student = swap(model, f"layer1:lora(r=3, alpha=5, init={init})")
    torch.testing.assert_close(student.model(IDS).logits, model(IDS).logits, atol=1e-4, rtol=0)
    for path, layer in adapters(student).items():
        original = model.get_submodule(student.layout.slot_path(1, "attn")).get_submodule(path)
        weight = original.weight.T if isinstance(original, Conv1D) else original.weight
        weight = weight.detach().double()
        product = (layer.lora_B.default.weight @ layer.lora_A.default.weight).detach().double()
        rest = layer.base_layer.weight.double()
        torch.testing.assert_close(rest + 5 / 3 * product, weight, atol=1e-5, rtol=0)
        if init == "pissa":
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
            wanted = (u[:, :3] * s[:3]) @ vt[:3]
            torch.testing.assert_close(5 / 3 * product, wanted, atol=1e-4, rtol=0)
        else:
            q, r = torch.linalg.qr(weight)
            torch.testing.assert_close(product, q[:, :3] @ r[:3], atol=1e-4, rtol=0)
        names = dict(part(student).named_parameters())
        assert f"original.{path}.base_layer.weight" not in names  # a buffer: it does not train
        biases = layer.base_layer.bias, original.bias
        assert biases == (None, None) or same_memory(*biases)
        assert f"{path}.weight" in student.plan.clauses[0].dropped
    assert all(torch.equal(model.state_dict()[name], old) for name, old in before.items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert "copies, frozen" in student.plan.clauses[0].notes[0]


def test_the_base_is_the_teachers_memory_and_the_students_config():
    model = tiny("llama").requires_grad_(False)
    student = swap(model, "layer1:lora")
    theirs, ours = model.model.layers[1].self_attn, part(student)
    assert same_memory(ours.q_proj.base_layer.weight, theirs.q_proj.weight)
    assert same_memory(ours.o_proj.weight, theirs.o_proj.weight)
    assert ours.config is student.model.config
    assert isinstance(theirs.q_proj, nn.Linear)
    assert not any(p.requires_grad for p in model.parameters())
    trained = {n for n, p in student.model.named_parameters() if p.requires_grad}
    place = "model.layers.1.self_attn.original"
    assert trained == {
        f"{place}.{path}.lora_{x}.default.weight" for path in ("q_proj", "v_proj") for x in "AB"
    }
    clause = student.plan.clauses[0]
    assert clause.dropped == {}
    assert clause.new_parameters == {
        "original.q_proj.lora_A.default.weight": 8 * 24,
        "original.q_proj.lora_B.default.weight": 8 * 32,
        "original.v_proj.lora_A.default.weight": 8 * 24,
        "original.v_proj.lora_B.default.weight": 8 * 16,
    }


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_how_it_starts(init):
    model = tiny("llama", hidden_size=512, num_attention_heads=4)
    layers = adapters(swap(model, f"layer1:lora(r=64, init={init})"))
    a = layers["q_proj"].lora_A.default.weight
    if init == "kaiming":
        bound = 1 / math.sqrt(512)
        assert a.abs().max() <= bound
        assert abs(a.std() / (bound / math.sqrt(3)) - 1) < 0.02
    else:
        assert abs(a.std() * 64 - 1) < 0.02
    assert layers["q_proj"].lora_B.default.weight.abs().max() == 0
    assert not torch.equal(a, layers["v_proj"].lora_A.default.weight)


def test_draws_depend_on_seed_and_place_only_and_leave_the_global_state_alone():
    model = tiny("llama")

    def a(text, seed=0, layer=1):
        tree = part(swap(model, text, seed), layer).original
        return tree.q_proj.lora_A.default.weight

    state = torch.random.get_rng_state()
    first = a("layer1:lora")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(a("layer1:lora(targets=[o_proj, q_proj])"), first)
    assert not torch.equal(a("layer1:lora", seed=1), first)
    assert not torch.equal(a("layer2:lora", layer=2), first)


def test_over_another_mechanism_it_adapts_what_that_one_inherited():
    model, ids = tiny("llama"), tokens(2, 20)
    alone = swap(model, "layer1:infini(segment=8)")
    student = swap(model, "layer1:infini(segment=8); layer1:lora")
    assert torch.equal(student.model(ids).logits, alone.model(ids).logits)
    draw_over = part(student).original
    with torch.no_grad():
        draw_over.q_proj.lora_B.default.weight.fill_(0.1)
    whole = student.model(ids).logits
    assert (whole - alone.model(ids).logits).abs().max() > 1e-3
    torch.testing.assert_close(in_chunks(student.model, ids, 6), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "layer1:lora(targets=[q_proj, gate])",
            "layer1.attn: LlamaAttention has no linear layer `gate`\n\n"
            "hint: its linear layers: q_proj, k_proj, v_proj, o_proj; `all` means every one",
        ),
        (
            "layer1:lora(r=17, init=pissa)",
            "layer1.attn: init=pissa takes 17 directions out of `v_proj`, a matrix of 16 x 24\n\n"
            "hint: take r <= 16, or init=kaiming",
        ),
        (
            "layer1:linear; layer1:lora",
            "layer1.attn: Linear has no projections of queries and values to adapt\n\n"
            "hint: name the targets: it has no linear layer",
        ),
    ],
)
def test_refusals(text, message):
    with pytest.raises(SurgeryError) as caught:
        swap(tiny("llama"), text)
    assert str(caught.value) == message
