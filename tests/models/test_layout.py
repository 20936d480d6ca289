"""The layout of each family, and the probe that proves it."""

from __future__ import annotations

import pytest
import random_models
import torch
import transformers

from mismatch.errors import LayoutError
from mismatch.forward import verify as probe
from mismatch.models.families import FAMILIES, family_of
from mismatch.models.layout import Layout


def test_every_family_is_proved_on_a_model(family, tiny):
    layout = Layout.of(tiny(family))
    probe.prove(layout)
    assert layout.n_layers == 3
    assert layout.d_model == 32
    assert layout.vocab == 101


def test_the_families_of_the_tests_are_those_of_the_table():
    known = {kind for family in FAMILIES for kind in family.model_types}
    assert known == set(random_models.FAMILIES)


def test_head_is_the_models_own(family, tiny):
    model = tiny(family)
    layout = Layout.of(model)
    ids = torch.arange(12)[None]
    final = layout.decoder(input_ids=ids, use_cache=False).last_hidden_state
    chunks = torch.cat([layout.head(final[:, :5]), layout.head(final[:, 5:])], dim=1)
    torch.testing.assert_close(chunks, model(ids, use_cache=False).logits)


def test_unknown_family_says_what_is_known():
    config = transformers.BertConfig()
    with pytest.raises(LayoutError) as caught:
        family_of(config)
    assert str(caught.value).startswith(
        "model family `bert` is not known: no layout names its blocks"
    )
    assert "llama" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_kv_shared_layers": 20}, "its last 20 layers read keys and values of earlier ones"),
        ({"enable_moe_block": True}, "its experts read the stream past the MLP's norm"),
    ],
)
def test_a_gemma4_that_cannot_run_block_by_block_says_why(changes, why):
    with pytest.raises(LayoutError, match=f"family `gemma4` cannot be traced: {why}"):
        family_of(transformers.AutoConfig.for_model("gemma4_text", **changes))


def test_what_a_block_adds_behind_its_mlp_is_counted(tiny):
    model = tiny("gemma4_text")
    with torch.no_grad():
        model.model.layers[1].layer_scalar.mul_(1.5)
    probe.prove(Layout.of(model))
    block = model.model.layers[1]
    block.post_per_layer_input_norm.forward = lambda x: x * 0
    probe.prove(Layout.of(model))
    whole = block.forward
    block.forward = lambda *args, **kwargs: whole(*args, **kwargs) * block.layer_scalar
    with pytest.raises(LayoutError, match="resid_post of layer 1 is not resid_pre"):
        probe.prove(Layout.of(model))


def test_slots_that_one_layer_lacks(tiny):
    layout = Layout.of(tiny("qwen3_5_text"))
    assert layout.slot_path(0, "attn") == "model.layers.0.linear_attn"
    assert layout.slot_path(1, "attn") == layout.slot_path(1, "rope") == "model.layers.1.self_attn"
    with pytest.raises(
        LayoutError, match=r"layer0\.q_proj: qwen3_5 has no such slot here"
    ) as caught:
        layout.slot_path(0, "q_proj")
    assert caught.value.hint.endswith("gate_proj, up_proj, down_proj, block")
    same = Layout.of(tiny("gemma4_text", attention_k_eq_v=True, num_global_key_value_heads=1))
    assert same.slot_path(0, "v_proj") == "model.layers.0.self_attn.v_proj"
    with pytest.raises(LayoutError, match=r"layer1\.v_proj: .*its keys are its values"):
        same.slot_path(1, "v_proj")


def test_slot_that_the_family_lacks(tiny):
    layout = Layout.of(tiny("gpt2"))
    with pytest.raises(LayoutError) as caught:
        layout.slot_path(0, "rope")
    assert caught.value.message == "gpt2 has no slot `rope` (learned positions)"


def test_a_model_changed_beforehand_is_refused(tiny):
    model = tiny("llama")
    del model.model.layers[0].post_attention_layernorm
    with pytest.raises(LayoutError, match=r"should have block\.post_attention_layernorm"):
        Layout.of(model)


def test_probe_sees_parts_that_do_not_add_up(tiny):
    model = tiny("llama")
    # What leaves the MLP is halved after the tap: the sum no longer holds.
    block = model.model.layers[1]
    whole = block.forward
    block.forward = lambda *args, **kwargs: whole(*args, **kwargs) * 0.5
    with pytest.raises(LayoutError, match="resid_post of layer 1 is not resid_pre"):
        probe.prove(Layout.of(model))


def test_probe_sees_a_site_without_effect(tiny):
    model = tiny("llama")
    for block in model.model.layers[1:]:
        inner = block.mlp.forward
        block.mlp.forward = lambda x, inner=inner: inner(x) * 0
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    with pytest.raises(LayoutError, match="can be changed without changing the output"):
        probe.prove(Layout.of(model))


def test_probe_sees_a_site_that_fires_twice(tiny):
    model = tiny("llama")
    attention = model.model.layers[2].self_attn
    layer = model.model.layers[2]
    original = layer.forward

    def forward(hidden_states, **kwargs):
        attention(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        return original(hidden_states, **kwargs)

    layer.forward = forward
    with pytest.raises(LayoutError, match="attn_out of layer 2 fires more than once"):
        probe.prove(Layout.of(model))
