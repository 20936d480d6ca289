"""Several texts in one row, as packing collators make them: each text has the outputs that it has alone."""

from __future__ import annotations

import functools

import pytest
import torch
from callers import CALLS, COUNTS, TEXTS, blocks, cases, each_text_alone, packed
from tiny_models import swap, tiny, tokens
from transformers import DataCollatorWithFlattening

from mismatch.errors import SurgeryError

FAMILIES = ("llama", "gemma3", "gpt2", "gpt_neox")


@pytest.fixture(scope="module")
def student():
    """`student(family, name, attn)`: nothing here changes it."""

    def make(family, name, attn="sdpa"):
        if name == "qlora":
            pytest.importorskip("bitsandbytes")
        return swap(tiny(family, attn), f"layer1:{CALLS[name]}").model

    return functools.cache(make)


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
    model = swap(tiny("llama").requires_grad_(True), f"layer1:{CALLS[name]}").model
    ids, restarts, _ = packed()
    got = _gradient(model, model(ids, position_ids=restarts, use_cache=False).logits)
    wanted = _gradient(model, each_text_alone(model, ids))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def _gradient(model, logits):
    model.zero_grad()
    logits.pow(2).mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
