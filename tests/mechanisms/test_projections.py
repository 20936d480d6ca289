"""Softmax attention rebuilt from the pieces of the module equals the module, for every family."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, N_LAYERS, tiny, tokens

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context
from mismatch.mechanisms.parts.projections import AttentionParts
from mismatch.models.layout import Layout


class Rebuilt(AttentionParts):
    """Plain softmax attention."""

    def forward(self, *args, **kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        q, k, v = self.qkv(x)
        q, k = self.rotate(q, k, kwargs.get("position_embeddings"))
        i = torch.arange(x.shape[1])
        mask = i[:, None] >= i
        if self.window is not None:
            mask = mask & (i[:, None] - i < self.window)
        return self.project(self.attend(q, k, v, mask[None, None]), x), None


def context(layer=0):
    return Context(layer=layer, slot="attn", n_layers=N_LAYERS, d_model=24, model_config=None)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rebuilt_from_its_pieces_every_attention_is_itself(family, attn):
    model = tiny(family, attn)
    layout = Layout.of(model)
    ids = tokens(2, 40)
    with torch.no_grad():
        wanted = model(ids).logits
        for layer in range(N_LAYERS):
            path = layout.slot_path(layer, "attn")
            original = model.get_submodule(path)
            model.set_submodule(path, Rebuilt(original, None, context(layer)))
        got = model(ids).logits
    assert wanted.abs().max() > 0.5
    torch.testing.assert_close(got, wanted, atol=3e-5, rtol=0)


def test_parameters_are_the_originals_under_the_same_names():
    original = Layout.of(tiny("qwen3")).blocks[1].self_attn
    parts = AttentionParts(original, None, context(1))
    mine, theirs = dict(parts.named_parameters()), dict(original.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in theirs)


def test_an_attention_with_an_unknown_parameter_is_refused():
    original = Layout.of(tiny("llama")).blocks[1].self_attn
    original.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(
        SurgeryError, match=r"layer1\.attn: LlamaAttention has parameters .* drop: sinks"
    ):
        AttentionParts(original, None, context(1))


def test_what_is_no_attention_is_refused():
    with pytest.raises(
        SurgeryError, match="looked for q_proj k_proj v_proj o_proj, qkv_proj o_proj"
    ):
        AttentionParts(Layout.of(tiny("llama")).blocks[1].mlp, None, context(1))


def test_attention_that_looks_ahead_is_refused():
    original = Layout.of(tiny("llama")).blocks[1].self_attn
    original.is_causal = False
    with pytest.raises(SurgeryError, match="not causal"):
        AttentionParts(original, None, context(1))
