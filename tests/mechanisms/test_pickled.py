"""A swapped model through `torch.save`, pickle and `copy.deepcopy`: the same model, that goes on being one."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from test_mechanism_contract import CALLS, IN_HEADS, text
from tiny_models import positions, quantised, swap, tiny, tokens

from mismatch.surgery import saving

IDS = tokens(2, 21)
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
def logits(model, mask=MASK):
    """Of a padded batch: a mechanism that no longer hears of padding shows."""
    given = {} if mask is None else {"attention_mask": mask, "position_ids": positions(mask)}
    return model(IDS, **given).logits[MASK == 1]


@pytest.mark.parametrize("again", [pickled, copy.deepcopy])
@pytest.mark.parametrize("name", [*CALLS, *IN_HEADS])
def test_it_is_the_same_model(name, again, tmp_path):
    if name in ("qlora", "quantized"):
        pytest.importorskip("bitsandbytes")
    model = swap(tiny("llama"), text(name, 1)).model
    other = again(model)
    assert type(other) is type(model)
    assert torch.equal(logits(other), logits(model))
    assert torch.equal(logits(other, None), logits(model, None))
    # It has its own tensors, and what is known of its swap.
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    assert logits(model).abs().max() > 0
    assert other.swap_record == model.swap_record
    saving.save(other, tmp_path / "saved")


@pytest.mark.parametrize("again", [pickled, copy.deepcopy])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(bits, again, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = swap(quantised(tmp_path, bits), "layer1:infini(segment=8); layer1.mlp:lora").model
    assert torch.equal(logits(again(model)), logits(model))


def test_modules_of_others(theirs):
    model = swap(
        tiny("llama"), "layer1.attn:theirs.parts:Past; layer1.mlp:theirs:Gated(width=2)"
    ).model
    assert torch.equal(logits(pickled(model)), logits(model))
