"""Several texts in one row, as packing collators make them: each text has the outputs that it has alone."""

from __future__ import annotations

import pytest
import torch
from callers import COUNTS, TEXTS, blocks, cases, each_text_alone, packed, padded, text
from tiny_models import swap, tiny, tokens
from transformers import DataCollatorWithFlattening

from mismatch.errors import SurgeryError

FAMILIES = ("llama", "gemma3", "gpt2", "gpt_neox")


@pytest.mark.parametrize("family, name", cases(FAMILIES))
@torch.no_grad()
def test_a_packed_text_is_the_text_alone(student, family, name):
    """Positions that begin anew, and a 4-D mask of blocks."""
    model = student(family, name)
    ids, restarts, numbers = packed()
    alone = each_text_alone(model, ids)
    got = model(ids, position_ids=restarts, use_cache=False).logits
    torch.testing.assert_close(got, alone, atol=1e-4, rtol=0)
    if family != "gemma3":  # a mask of two kinds there: one for the layers with a window
        got = (
            model(ids, blocks(numbers), restarts, use_cache=False)
            if family != "gpt2"
            else model(ids, attention_mask=blocks(numbers), position_ids=restarts, use_cache=False)
        )
        torch.testing.assert_close(got.logits, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", COUNTS)
@torch.no_grad()
def test_what_the_flattening_collator_makes(student, name):
    model = student("llama", name, "eager")
    ids = tokens(2, 21)
    features = [{"input_ids": part.tolist()} for part in ids[0].split(TEXTS[0])]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate(features, return_tensors="pt")
    batch.pop("labels")
    alone = each_text_alone(model, ids)[:1]
    torch.testing.assert_close(model(**batch, use_cache=False).logits, alone, atol=1e-4, rtol=0)
    if name not in ("ring", "sliding_window"):
        del batch["position_ids"]
        with pytest.raises(SurgeryError, match="`seq_idx` tells of other texts in a row"):
            model(**batch, use_cache=False)
        del batch["seq_idx"]
        with pytest.raises(SurgeryError, match="`cu_seq_lens_q` tells of other texts in a row"):
            model(**batch, use_cache=False)


@pytest.mark.parametrize("name", COUNTS)
def test_gradients_of_a_packed_row_are_those_of_its_texts(student, name):
    model = swap(tiny("llama").requires_grad_(True), text(name)).model
    ids, restarts, _ = packed()
    got = _gradient(model, model(ids, position_ids=restarts, use_cache=False).logits)
    wanted = _gradient(model, each_text_alone(model, ids))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", COUNTS)
@torch.no_grad()
def test_several_texts_and_a_cache_are_refused(student, name):
    """With a cache the model's own attention lets them read one another."""
    model = student("llama", name)
    ids, restarts, _ = packed()
    with pytest.raises(SurgeryError, match="several texts, and the call has a KV cache") as error:
        model(ids, position_ids=restarts, use_cache=True)
    assert "use_cache=False" in str(error.value.hint)


@pytest.mark.parametrize("inner", ["rwkv", "mamba2", "linear_attention(window=3, sinks=1)"])
@torch.no_grad()
def test_beside_the_original(inner):
    model = swap(
        tiny("llama"),
        f"layer1:parallel({inner}, alpha=0.5); layer0:sliding_window(window=4, sinks=1)",
    ).model
    ids, restarts, _ = packed()
    got = model(ids, position_ids=restarts, use_cache=False).logits
    torch.testing.assert_close(got, each_text_alone(model, ids), atol=1e-4, rtol=0)


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "text",
    [
        "layer1.attn:theirs.parts:Past",
        "layer1.attn:theirs.parts:Told",
        "layer1.attn:theirs.parts:Pooled",
        "layer1.block:theirs.parts:Doubled",
        "layer1:parallel(theirs.parts:Past, alpha=0.5)",
    ],
)
@torch.no_grad()
def test_a_users_module_is_asked_the_same(family, text):
    """One that cannot know of pads and texts is given each text alone; one that takes `token_facts` sees to it."""
    model = swap(tiny(family), text).model
    ids, restarts, _ = packed()
    got = model(ids, position_ids=restarts, use_cache=False).logits
    torch.testing.assert_close(got, each_text_alone(model, ids), atol=1e-4, rtol=0)
    ids, mask, places = padded()
    got = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    for row, pads in enumerate((6, 3)):
        alone = model(ids[row : row + 1, pads:], use_cache=False).logits
        torch.testing.assert_close(got[row : row + 1, pads:], alone, atol=1e-4, rtol=0)


def _gradient(model, logits):
    model.zero_grad()
    logits.pow(2).mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
