"""Callers of a student: every way in which padding and several texts in a row are told to a model.

The mechanisms are those of the contract, with sinks where they can have them: what counts tokens from the start shows
most.
"""

from __future__ import annotations

import pytest
import torch
from test_mechanism_contract import CALLS as PLAIN
from test_mechanism_contract import fits
from tiny_models import positions, tokens

CALLS = PLAIN | {
    "infini": "infini(segment=4, sinks=2, overlap=1, normalizer=shared, feature_map=hedgehog, slots=2, "
    "slot_score=recall_error)",
    "kv_slots": "kv_slots(segment=4, sinks=2, slots=3, slot_score=value_norm)",
    "parallel": "parallel(infini(segment=4, sinks=2), alpha=0.5)",
    "sliding_window": "sliding_window(window=5, sinks=2, global_every=4)",
}
# What keeps a state, or counts tokens: what could mistake one text, or a pad, for another.
COUNTS = (
    "gated_deltanet", "infini", "kda", "kv_slots", "linear_attention", "mamba", "mamba2", "moba", "parallel", "ring",
    "rwkv", "short_conv", "sliding_window",
)  # fmt: skip
HEADS = {
    "infini in heads": "infini(segment=4, sinks=2)",
    "linear_attention in heads": "linear_attention(window=5, sinks=2)",
    "sliding_window in heads": "sliding_window(window=5, sinks=2, global_every=4)",
}
TEXTS = ((7, 1, 13), (10, 3, 8))  # lengths, row by row
LENGTH = 21
LOWEST = torch.finfo(torch.float32).min


def text(name):
    """The swap of layer 1; in some heads of it where the name says so."""
    return f"layer1.heads[0,1,3]:{HEADS[name]}" if name in HEADS else f"layer1:{CALLS[name]}"


def cases(families, others=("llama",)):
    """The mechanisms that count on all families, the others on some."""
    found = [(f, n) for f in families for n in CALLS if n in COUNTS or f in others]
    found += [(f, n) for f in ("llama", "gpt2") if f in families for n in HEADS]
    return [pytest.param(f, n, id=f"{f}-{n}") for f, n in found if fits(f, n)]


def packed():
    """Ids, positions that begin anew with each text, and the number of each token's text: `2 21` each."""
    counts = [torch.cat([torch.arange(n) for n in row]) for row in TEXTS]
    numbers = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in TEXTS]
    return tokens(len(TEXTS), LENGTH), torch.stack(counts), torch.stack(numbers)


def each_text_alone(model, ids):
    """Logits of the packed texts, each run by itself."""
    rows = zip(ids, TEXTS, strict=True)
    parts = [
        [model(text[None], use_cache=False).logits for text in row.split(n)] for row, n in rows
    ]
    return torch.cat([torch.cat(row, dim=1) for row in parts])


def blocks(numbers):
    """The 4-D mask of texts that read themselves alone: bool `batch 1 queries keys`."""
    same = numbers[:, :, None] == numbers[:, None]
    return same.tril()[:, None]


def padded(side="left"):
    """Ids, 2-D mask and positions of a padded batch: `2 21` each."""
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    for row, pads in enumerate((6, 3)):
        mask[row, :pads] = 0
    mask = mask if side == "left" else mask.flip(1)
    return ids, mask, positions(mask)


def pairs(mask):
    """The 4-D mask of padding: bool `batch 1 queries keys`; a pad reads what is real before it."""
    return (mask.bool()[:, None] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())[:, None]


def added(allowed, low=LOWEST):
    """A mask that is added to the scores."""
    return torch.where(allowed, 0.0, low)


def decoder(model):
    """The model without its head."""
    return model.get_submodule(model.base_model_prefix)
