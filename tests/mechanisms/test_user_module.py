"""A module from another package, named in the swap: a subclass of Mechanism, or a plain torch module."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny_models import FAMILIES, N_LAYERS, in_chunks, part, swap, tiny, tokens
from torch import nn

import mismatch
from mismatch.errors import MismatchError, SurgeryError
from mismatch.registry import mechanisms
from mismatch.registry.explain import explain
from mismatch.spec import check, parse

pytestmark = pytest.mark.usefixtures("theirs")


# a subclass of Mechanism -------------------------------------------------------------------------


def test_a_mechanism_of_another_package_is_one_of_ours():
    model, ids = tiny("llama"), tokens(2, 9)
    student = swap(model, "layer1:theirs.parts:Half(factor=1)")
    assert torch.equal(student.model(ids).logits, model(ids).logits)
    clause = student.plan.clauses[0]
    assert (clause.mechanism, clause.slot, clause.identity) == (
        "theirs.parts:Half",
        "attn",
        "factor=1",
    )
    half = swap(model, "layer1.mlp:theirs.parts:Half")
    x = torch.randn(1, 4, 24)
    torch.testing.assert_close(part(half, slot="mlp")(x), 0.5 * model.model.layers[1].mlp(x))


def test_it_nests():
    model, ids = tiny("llama"), tokens(2, 9)
    student = swap(model, "layer1:parallel(theirs.parts:Half(factor=1), alpha=0.5)")
    x = torch.randn(1, 4, 24)
    embeddings = model.model.rotary_emb(x, torch.arange(4)[None])
    (ours, _), (theirs, _) = (
        attn(hidden_states=x, position_embeddings=embeddings, attention_mask=None)
        for attn in (part(student), model.model.layers[1].self_attn)
    )
    torch.testing.assert_close(ours, 1.5 * theirs)
    assert student.model(ids).logits.isfinite().all()


# a plain module ----------------------------------------------------------------------------------


def test_a_plain_module_is_built_of_its_arguments_the_config_and_the_layer():
    model = tiny("llama")
    text = 'layer1:theirs.parts:Gated(width=5, bias=false, name="a b", kinds=[p, q])'
    student = swap(model, text)
    mine = part(student, slot="mlp").module
    assert mine.seen == (5, False, "a b", ("p", "q"))
    assert mine.down.weight.shape == (5, 24)
    past = part(swap(model, "layer2.attn:theirs.parts:Past(scale=2.0)"), 2).module
    assert (past.layer_idx, past.scale) == (2, 2.0)
    clause = student.plan.clauses[0]
    assert clause.new_parameters == {"module.down.weight": 120, "module.up.weight": 120}
    assert clause.dropped.keys() == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    assert (clause.old, clause.new) == ("LlamaMLP", "Gated")
    assert clause.args == {"width": 5, "bias": False, "name": "a b", "kinds": ("p", "q")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text",
    [
        "layer1:theirs.parts:Gated",
        "layer1.attn:theirs.parts:Past",
        "layer1.block:theirs.parts:Doubled",
        "all.attn:theirs.parts:PerToken",
        "layer1.norm1:theirs.parts:Doubled",
        "final_norm:theirs.parts:Doubled",
        "layer1.mlp:theirs.parts:Doubled; layer1.mlp:parallel(theirs.parts:Gated, alpha=0.5)",
    ],
)
def test_it_is_called_as_its_slot_is_in_every_family(family, text):
    model, ids = tiny(family), tokens(2, 15)
    student = swap(model, text)
    logits = student.model(ids).logits
    assert logits.isfinite().all()
    assert not torch.equal(logits, model(ids).logits)
    student.undo()
    assert torch.equal(student.model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("slot", ["attn", "block"])
def test_positions_stay_right_when_it_writes_nothing_to_the_cache(family, slot):
    model, ids = tiny(family), tokens(2, 15)
    name = "PerToken" if slot == "attn" else "Doubled"
    for layers in ("layer0", f"layer{N_LAYERS - 1}", "all"):
        student = swap(model, f"{layers}.{slot}:theirs.parts:{name}").model
        whole = student(ids).logits
        torch.testing.assert_close(in_chunks(student, ids, 4), whole, atol=1e-4, rtol=1e-5)


def test_one_that_writes_to_the_cache_is_left_to_it():
    model, ids = tiny("llama"), tokens(2, 15)
    student = swap(model, "layer0.attn:theirs.parts:LlamaAttention").model
    torch.testing.assert_close(in_chunks(student, ids, 4), student(ids).logits, atol=1e-4, rtol=0)
    whole = student.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = student.generate(
        ids, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False
    )
    assert torch.equal(whole, plain)


def test_the_plan_warns_of_generation_where_a_cache_is_handed_over():
    model = tiny("llama")
    (note,) = swap(model, "layer1.attn:theirs.parts:Past").plan.clauses[0].notes
    assert "use_cache=False" in note
    assert swap(model, "layer1:theirs.parts:Gated").plan.clauses[0].notes == ()


def test_its_draws_depend_on_seed_and_place_only():
    model = tiny("llama")

    def weight(seed=0, layer=1):
        student = swap(model, f"layer{layer}:theirs.parts:Gated", seed)
        return part(student, layer, "mlp").module.down.weight

    state = torch.random.get_rng_state()
    assert torch.equal(weight(), weight())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(weight(seed=1), weight())
    assert not torch.equal(weight(layer=2), weight())


def test_it_takes_the_models_format_and_builds_without_weights():
    student = swap(tiny("llama").to(torch.bfloat16), "layer1:theirs.parts:Gated")
    assert part(student, slot="mlp").module.up.weight.dtype == torch.bfloat16
    assert student.model(tokens(1, 5)).logits.dtype == torch.bfloat16
    with torch.device("meta"):
        student = swap(tiny("llama"), "layer1:theirs.parts:Gated")
    assert all(p.device.type == "meta" for p in student.model.parameters())


def test_under_autocast_its_output_may_have_autocasts_format():
    student = swap(tiny("llama"), "layer1:theirs.parts:Gated")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert student.model(tokens(1, 5)).logits.isfinite().all()


def test_a_library_class_and_a_class_that_a_package_only_imports():
    model, x = tiny("llama"), torch.randn(1, 4, 24)
    student = swap(model, "layer1.mlp:torch.nn:Linear(in_features=24, out_features=24, bias=false)")
    mine = part(student, slot="mlp")
    torch.testing.assert_close(mine(x), x @ mine.module.weight.T)
    gated = swap(model, "layer1:theirs:Gated(width=2)")  # its slots are read off the class
    assert gated.plan.clauses[0].slot == "mlp"


def test_a_class_of_a_notebook(monkeypatch):
    monkeypatch.setattr(mechanisms(), "_added", {})

    class Mine(nn.Module):
        """Made in a cell."""

        slots = ("mlp",)

        def __init__(self, factor=2):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return self.factor * x

    mechanisms().add("mine_of_test", Mine)
    student = swap(tiny("llama"), "layer1:mine_of_test(factor=3)")
    assert torch.equal(part(student, slot="mlp")(torch.ones(1, 1, 24)), torch.full((1, 1, 24), 3.0))


def test_explain_shows_what_its_file_says():
    text = explain("theirs.parts:Gated")
    assert text.startswith("theirs.parts:Gated   mechanism\n\nParts of somebody's own.")
    assert "slots  mlp" in text


# what is refused ---------------------------------------------------------------------------------


def test_through_the_whole_of_mismatch():
    """`mismatch.swap` proves the student, so the error comes before any text is read or traced."""
    model = tiny("llama")
    with pytest.raises(SurgeryError, match="the slot `attn` needs the pair"):
        mismatch.swap((model, None), "layer0.attn:theirs.parts:Returns")
    student = mismatch.swap((model, None), "layer1:theirs.parts:Gated(width=4)")
    assert student.plan.spec == "layer1:theirs.parts:Gated(width=4)"


def test_a_swap_that_names_a_class_is_checked_without_importing_it(tmp_path):
    code = (
        "import sys; from mismatch.spec import parse, check;"
        "check(parse('layer1:theirs.parts:Gated(width=4)'));"
        "assert not {'torch', 'theirs', 'theirs.parts'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(tmp_path)})
    assert str(check(parse("layer1:theirs.parts:Gated(width=4)"))) == (
        "layer1:theirs.parts:Gated(width=4)"
    )
    assert issubclass(SurgeryError, MismatchError)
