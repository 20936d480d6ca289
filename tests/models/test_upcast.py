"""A model in float32 block by block: the logits of the model that is float32 as a whole, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch

from mismatch.models.layout import Layout
from mismatch.models.upcast import in_float32


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_neox"])
def test_the_logits_are_those_of_the_whole_model(tiny, family):
    narrow = copy.deepcopy(tiny(family)).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    wide, ids = in_float32(Layout.of(narrow)), torch.arange(24).view(2, 12)
    with torch.no_grad():
        wanted = copy.deepcopy(narrow).float()(input_ids=ids).logits
        assert torch.equal(wide.model(input_ids=ids).logits, wanted)
        assert torch.equal(wide.model(input_ids=ids).logits, wanted)
    assert {p.dtype for p in wide.blocks.parameters()} == {torch.bfloat16}
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype


def test_a_block_that_fails_is_narrow_again(tiny):
    wide = in_float32(Layout.of(copy.deepcopy(tiny("llama")).to(torch.bfloat16)))

    def fails(*_args):
        raise RuntimeError("planted")

    wide.blocks[1].mlp.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="planted"):
        wide.model(input_ids=torch.arange(6)[None])
    assert {p.dtype for p in wide.blocks.parameters()} == {torch.bfloat16}
