"""Every mechanism on a model whose matrices bitsandbytes keeps in 4 or 8 bits: as on the same numbers in full."""

from __future__ import annotations

import functools

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from test_mechanism_contract import BEGINS_AS_TEACHER, CALLS, LENGTH, fits
from tiny_models import N_LAYERS, in_numbers, part, quantised, swap, tokens

from mismatch.errors import ModelError, SurgeryError
from mismatch.models.folder import refuse_quantised
from mismatch.models.load import describe
from mismatch.models.quantised import quantised as quantised_layers
from mismatch.registry import mechanisms
from mismatch.surgery import saving
from mismatch.surgery.loading import MismatchForCausalLM

pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")

CONTROLS = ("random", "zero", "mean", "skip", "linear", "identity")
IDS = tokens(2, LENGTH)
# 8-bit layers round what comes in as well, which no matrix does.
NEAR = {4: 1e-4, 8: 0.3}
SLOW = pytest.mark.slow
BITS = [4, pytest.param(8, marks=SLOW)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """`teacher(bits, family)`: the quantised model, and the same in numbers; nothing here changes them."""

    @functools.cache
    def make(bits, family="llama"):
        model = quantised(tmp_path_factory.mktemp("model"), bits, family)
        return model, in_numbers(model)

    return make


def text(name: str, layer: int = 1) -> str:
    call = CALLS[name]
    return f"layer{layer}:{call.replace(', dora=true', '')}"  # of 8 bits it is refused, see below


def off(a, b) -> float:
    return float((a - b).abs().max())


@torch.no_grad()
def logits(model):
    return model(IDS).logits


CASES = [
    pytest.param(family, name, bits, id=f"{family}-{name}-{bits}", marks=marks)
    for family, bits, marks in (("llama", 4, ()), ("llama", 8, SLOW), ("gpt2", 4, SLOW))
    for name in CALLS
    if fits(family, name)
]


@pytest.mark.parametrize("family, name, bits", CASES)
def test_it_is_what_it_is_on_the_same_numbers_in_full(teacher, family, name, bits):
    model, full = teacher(bits, family)
    before = logits(model)
    student, twin = swap(model, text(name)), swap(full, text(name))
    got = logits(student.model)
    assert off(got, logits(twin.model)) < NEAR[bits] * float(before.abs().max())
    assert torch.equal(logits(model), before)
    if name in BEGINS_AS_TEACHER:
        assert torch.equal(got, before)
    ours, theirs = student.plan.clauses[0], twin.plan.clauses[0]
    assert ours.inherited | ours.new_parameters == theirs.inherited | theirs.new_parameters
    assert ours.dropped == theirs.dropped
    student.undo()
    assert torch.equal(logits(student.model), before)


PLACED = [
    (name, place)
    for name in CONTROLS
    for place in ("attn", "mlp", "block", "norm1", "q_proj", "down_proj")
    if place in mechanisms().card(name).facts["slots"]
]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name, place", PLACED)
def test_a_control_is_what_it_is_in_full_and_not_the_teacher(teacher, name, place, bits):
    model, full = teacher(bits)
    call = f"layer1.{place}:{name}"
    got, wanted = logits(swap(model, call).model), logits(swap(full, call).model)
    assert off(got, wanted) < NEAR[bits] * float(wanted.abs().max())
    assert (off(got, logits(model)) > 0.1) == (name != "identity")


def test_codes_under_the_name_of_another_dtype_are_not_taken_for_numbers(tmp_path):
    """Sharded training keeps the codes as bfloat16; they are floating-point by name."""
    model = quantised(tmp_path, 4)
    for _, layer in quantised_layers(model):
        layer.weight.data = layer.weight.data.view(-1).view(torch.bfloat16)[:, None]
    full = in_numbers(quantised(tmp_path, 4))
    got, wanted = (logits(swap(one, "layer1:random").model) for one in (model, full))
    assert off(got, wanted) < 1e-4


@pytest.mark.parametrize("bits", BITS)
def test_new_tensors_have_the_dtype_of_the_model(tmp_path, bits):
    model = quantised(tmp_path, bits, dtype=torch.bfloat16)
    for name in CALLS:
        student = swap(model, text(name))
        clause = student.plan.clauses[0]
        kinds = {
            parameter.dtype
            for inner, parameter in student.model.get_submodule(clause.path).named_parameters()
            if inner in clause.new_parameters
        }
        assert kinds <= {torch.bfloat16}, name
        assert logits(student.model).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "call, bits",
    [
        (call, bits)
        for call in ("lora", "lora(dora=true)", "lora(init=pissa)", "qlora", "qlora(dora=true)")
        for bits in (None, 4, 8)
        if (call, bits) != ("lora(dora=true)", 8)  # refused, see below
    ],
)
def test_a_merged_adapter_adds_what_it_added(teacher, call, bits):
    """peft's own `merge`, on the spot. Rounded to few bits again the sum would have lost the adapter."""
    model = teacher(bits or 4)[bits is None]
    before = logits(model)
    student = swap(model, f"layer1:{call}")
    fresh = student.plan.clauses[0].new_parameters
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in part(student).named_parameters():
            if name in fresh and weight.ndim == 2:
                weight.add_(0.3 * torch.randn_like(weight))
    adapted = logits(student.model)
    assert off(adapted, before) > 0.1
    layers = [m for m in student.model.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        layer.merge()
    # A merged 8-bit layer no longer rounds what comes in; those behind it do, and the last bit of a sum may tip a step.
    near = 2e-5 if bits != 8 else 0.1
    assert off(logits(student.model), adapted) < near
    for layer in layers:
        layer.unmerge()
    assert off(logits(student.model), adapted) < near


def test_dora_over_8_bits_is_refused(teacher):
    with pytest.raises(SurgeryError) as caught:
        swap(teacher(8)[0], "layer1:lora(dora=true)")
    assert str(caught.value.message) == (
        "layer1.attn: `q_proj` is kept in 8 bits, where peft's DoRA cannot read its lengths"
    )
    assert caught.value.hint == "dora=false, or load the model in 4 bits or without quantisation"


def test_what_cannot_be_redrawn_is_refused(teacher):
    model = in_numbers(teacher(4)[0])
    layer = model.model.layers[1].self_attn.v_proj
    layer.weight = torch.nn.Parameter(layer.weight.char(), requires_grad=False)
    with pytest.raises(SurgeryError) as caught:
        swap(model, "layer1:random")
    assert caught.value.message == (
        "layer1.attn: `random` cannot redraw `v_proj.weight`, which holds torch.int8 and no numbers"
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_running_it_changes_neither_its_weights_nor_their_fingerprint(tmp_path, bits):
    model = quantised(tmp_path, bits)
    first, before = describe(model), logits(model)
    model.state_dict()
    assert torch.equal(logits(model), before)
    assert describe(model) == first
    assert first.parameters == sum(p.numel() for p in in_numbers(model).parameters())
    layer = model.model.layers[0].mlp.up_proj
    (layer.weight.quant_state.absmax if bits == 4 else layer.state.SCB).view(torch.uint8)[0] ^= 1
    assert describe(model).sha256 != first.sha256


def test_other_ways_to_quantise_are_refused_and_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ModelError) as caught:
        refuse_quantised({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "here")
    assert caught.value.message == (
        "here: its weights are quantised by gptq; read are those of bitsandbytes (4 and 8 bits), and weights that "
        "are not quantised"
    )
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    refuse_quantised(config, "here")
    refuse_quantised({}, "here")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ModelError) as caught:
        refuse_quantised(config, "here")
    assert (
        caught.value.message
        == "here: its weights are quantised by bitsandbytes, which is not installed here"
    )
    assert caught.value.hint == "pip install 'llm-mismatch[qlora]'"


def one_a_layer() -> list[str]:
    """Swaps of every mechanism in its own slot, each at a layer of its own, as many in one model as it has layers."""
    slots = {name: mechanisms().card(name).facts["slots"][0] for name in CALLS}
    found = []
    for slot in dict.fromkeys(slots.values()):
        names = [name for name in CALLS if slots[name] == slot]
        for at in range(0, len(names), N_LAYERS):
            found.append("; ".join(map(text, names[at : at + N_LAYERS], range(N_LAYERS))))
    return found


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("call", one_a_layer())
def test_a_checkpoint_comes_back_to_the_bit(teacher, tmp_path, call, bits):
    """Whatever is in codes, in full, or both inside one module."""
    student = swap(teacher(bits)[0], call)
    saving.save(student.model, tmp_path / "saved")
    again = MismatchForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(student.model))
    assert [p for p, _ in quantised_layers(again)] == [
        p for p, _ in quantised_layers(student.model)
    ]
