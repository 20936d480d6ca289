"""On the real model, swaps of layer 12 are ordered as what they take away (SmolLM2-135M)."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import swap

from mismatch.texts.demo import fetch

SWAPS = ("identity", "sliding_window(window=64, sinks=1)", "infini(segment=64)", "zero", "random")


@pytest.mark.slow
def test_kl_grows_from_identity_to_random(smollm2):
    model, tokenizer = smollm2[:2]
    texts = [path.read_text() for path in sorted(fetch.fetch("wiki").glob("*.txt"))]
    ids = [tokenizer(t[:8000])["input_ids"] for t in texts if len(t) > 8000][:2]
    ids = torch.tensor([row[:384] for row in ids])
    with torch.no_grad():
        teacher = model(ids).logits.log_softmax(-1)
        kl = []
        for call in SWAPS:
            attn = ".attn" if call in ("identity", "zero", "random") else ""
            student = swap(model, f"layer12{attn}:{call}").model(ids).logits.log_softmax(-1)
            kl.append((teacher.exp() * (teacher - student)).sum(-1).mean().item())
    assert kl[0] == 0
    assert all(b > 1.1 * a for a, b in itertools.pairwise(kl)), dict(zip(SWAPS, kl, strict=True))
