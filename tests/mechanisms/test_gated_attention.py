"""Gates between the heads and their output projection, in every family, over the host's own attention."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, part, swap, tiny, tokens

from mismatch.errors import SpecError

IDS = tokens(2, 20)
OUTPUT = {"gpt2": "c_proj", "gpt_neox": "dense"}


def moved(student):
    """The same student, with gates that are not 1."""
    torch.manual_seed(1)
    attention = part(student)
    with torch.no_grad():
        attention.gate_weight.normal_(std=0.5)
        attention.gate_bias.normal_()
    return attention


@pytest.mark.parametrize("kind", ["elementwise", "headwise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_attention_with_gates_written_by_hand(family, kind):
    """A hook in front of the output projection of the teacher; its input is kept by another."""
    model = tiny(family)
    student = swap(model, f"layer1:gated_attention(gate={kind})")
    gated, seen = moved(student), []
    host = model.get_submodule(student.layout.slot_path(1, "attn"))

    def enter(_module, args, kwargs):
        seen[:] = [args[0] if args else kwargs["hidden_states"]]

    def gate(_module, args):
        logits = seen[0] @ gated.gate_weight.T + gated.gate_bias
        gates = 2 / (1 + torch.exp(-logits))
        heads = args[0].unflatten(-1, (4, -1))
        return ((heads * gates.unflatten(-1, (4, -1))).flatten(-2),)

    before = model(IDS).logits
    host.register_forward_pre_hook(enter, with_kwargs=True)
    getattr(host, OUTPUT.get(family, "o_proj")).register_forward_pre_hook(gate)
    wanted = model(IDS).logits
    assert (wanted - before).abs().max() > 0.05
    torch.testing.assert_close(student.model(IDS).logits, wanted, atol=1e-4, rtol=0)


def test_a_gate_that_is_shut_is_the_module_deleted():
    student = swap(tiny("mistral"), "layer1:gated_attention")
    with torch.no_grad():
        part(student).gate_bias.fill_(-200.0)
    wanted = swap(tiny("mistral"), "layer1:zero").model(IDS).logits
    torch.testing.assert_close(student.model(IDS).logits, wanted, atol=1e-5, rtol=0)


def test_a_head_has_one_gate_or_one_a_channel():
    for kind, width in (("elementwise", 32), ("headwise", 4)):
        clause = swap(tiny("llama"), f"layer1:gated_attention(gate={kind})").plan.clauses[0]
        assert clause.new_parameters == {"gate_weight": width * 24, "gate_bias": width}
        assert not clause.dropped


def test_in_some_heads_the_others_have_no_gate():
    student = swap(tiny("llama"), "layer1.heads[2]:gated_attention(gate=headwise)")
    assert torch.equal(student.model(IDS).logits, tiny("llama")(IDS).logits)
    with torch.no_grad():
        part(student).parts[0].gate_bias.fill_(-200.0)
    wanted = swap(tiny("llama"), "layer1.heads[2]:zero").model(IDS).logits
    torch.testing.assert_close(student.model(IDS).logits, wanted, atol=1e-5, rtol=0)


def test_under_a_window():
    both = swap(tiny("llama"), "layer1:gated_attention; layer1:sliding_window(window=4)").model
    window = swap(tiny("llama"), "layer1:sliding_window(window=4)").model
    torch.testing.assert_close(both(IDS).logits, window(IDS).logits, atol=1e-5, rtol=0)


def test_rubbish_is_refused():
    with pytest.raises(SpecError, match="must be one of elementwise, headwise, got `each`"):
        swap(tiny("llama"), "layer1:gated_attention(gate=each)")
