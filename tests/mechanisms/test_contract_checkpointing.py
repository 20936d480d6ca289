"""Gradient checkpointing: a layer that is computed again for the backward pass knows the padding and the texts of its
own forward, whatever was called in between."""

from __future__ import annotations

import pytest
import torch
from callers import cases, packed, padded, text
from tiny_models import swap, tiny


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family, name", cases(("llama", "gpt2"), others=()))
def test_two_forwards_and_one_backward(family, name, reentrant):
    changes = {"embd_pdrop": 0.0} if family == "gpt2" else {}
    model = swap(tiny(family, **changes).requires_grad_(True), text(name)).model
    wanted = _gradient(model.train())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(_gradient(model), wanted, atol=1e-6, rtol=1e-5)


def _gradient(model):
    """Of the sum over a batch padded on the left, one on the right, and a packed one."""
    model.zero_grad()
    loss = 0
    for ids, mask, places in (padded("left"), padded("right")):
        logits = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        loss = loss + logits[mask == 1].pow(2).mean()
    ids, restarts, _ = packed()
    loss = loss + model(ids, position_ids=restarts, use_cache=False).logits.pow(2).mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
