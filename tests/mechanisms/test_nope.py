"""No positions: against SmolLM3, which has layers without them, and by what the words mean."""

from __future__ import annotations

import pytest
import torch
from tiny_models import N_LAYERS, in_chunks, swap, tiny, tokens

from mismatch.errors import SpecError, SurgeryError
from mismatch.mechanisms.nope import identity_rotation

ROTARY = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "olmo2",
    "phi3",
    "gpt_neox",
    "qwen3_5",
    "gemma4",
)


def test_it_is_smollm3_built_without_rotary_in_that_layer():
    ids = tokens(2, 20)
    with_rope = tiny("smollm3", no_rope_layers=[1, 1, 1])
    without = tiny("smollm3", no_rope_layers=[1, 0, 1])
    without.load_state_dict(with_rope.state_dict())
    got = swap(with_rope, "layer1:nope").model(ids).logits
    torch.testing.assert_close(got, without(ids).logits, atol=1e-6, rtol=0)
    assert (with_rope(ids).logits - got).abs().max() > 1e-2


@pytest.mark.parametrize("family", ROTARY)
def test_without_positions_anywhere_a_shift_or_a_gap_changes_nothing(family):
    model, ids = tiny(family), tokens(2, 20)
    gaps = (3 * torch.arange(20) + 11)[None].expand(2, -1)
    # A full attention mask: else jumps in the positions are read as several packed texts.
    given = {"attention_mask": torch.ones_like(ids), "position_ids": gaps}
    assert (model(ids, **given).logits - model(ids).logits).abs().max() > 1e-2
    student = swap(model, "all:nope").model
    assert torch.equal(student(ids, **given).logits, student(ids).logits)
    torch.testing.assert_close(in_chunks(student, ids, 6), student(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_one_layer_only_loses_its_positions(layer):
    model, ids = tiny("llama"), tokens(2, 20)
    x = torch.randn(2, 20, 24)
    student = swap(model, f"layer{layer}:nope")
    for i, block in enumerate(student.layout.blocks):
        at = model.model.rotary_emb(x, torch.arange(20)[None])
        far = model.model.rotary_emb(x, 5 * torch.arange(20)[None])
        a, b = (
            block.self_attn(hidden_states=x, position_embeddings=p, attention_mask=None)[0]
            for p in (at, far)
        )
        assert torch.equal(a, b) == (i == layer)
    assert student.model(ids).logits.isfinite().all()


def test_infini_under_nope_loses_the_positions_of_its_local_part():
    ids = tokens(2, 20)
    student = swap(tiny("llama"), "all:infini(segment=8); all.rope:nope").model
    gaps = (3 * torch.arange(20) + 11)[None].expand(2, -1)
    given = {"attention_mask": torch.ones_like(ids), "position_ids": gaps}
    assert torch.equal(student(ids, **given).logits, student(ids).logits)


def test_the_attention_factor_of_yarn_is_no_position_and_stays():
    cos, sin = torch.rand(2, 5, 4), torch.zeros(2, 5, 4)
    angle = torch.rand(1, 5, 4)
    for factor, dtype in ((1.0, torch.float32), (1.1386, torch.float32), (1.0, torch.bfloat16)):
        cos, sin = (factor * f(angle) for f in (torch.cos, torch.sin))
        one, zero = identity_rotation(cos.to(dtype), sin.to(dtype))
        assert one.shape == cos.shape
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), torch.full_like(cos, factor))
        assert not zero.any()


def test_where_there_is_no_rotary_embedding_it_is_refused():
    with pytest.raises(SurgeryError, match=r"layer1\.rope: SmolLM3Attention has no rotary embed"):
        swap(tiny("smollm3"), "layer1:nope")
    with pytest.raises(SpecError, match="gpt2 has no slot `rope`"):
        swap(tiny("gpt2"), "layer1:nope")
