"""Where a swap text lands, on the mechanisms of these tests."""

from __future__ import annotations

from mismatch.spec import parse, resolve

LLAMA = ("norm1", "attn", "norm2", "mlp", "q_proj", "rope", "block", "final_norm")
GEMMA = ("norm1", "attn", "norm1_post", "norm2", "mlp", "norm2_post", "rope", "block", "final_norm")


def placed(text, n_layers=30, slots=LLAMA, family="llama", **rest):
    return [
        (p.layer, p.slot, str(p.call))
        for p in resolve(parse(text), n_layers, slots, family, **rest)
    ]
