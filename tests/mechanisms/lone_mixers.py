"""One mixer in the place of the attention of layer 1 of a tiny llama, for tests of the mechanisms themselves."""

from __future__ import annotations

import torch
from tiny_models import part, swap, tiny
from transformers import DynamicCache

from mismatch.mechanisms.parts.token_facts import TokenFacts

HEADS, KV, DIM, D_MODEL = 4, 2, 8, 24
CALLS = (
    "mamba2",
    "mamba2(conv=2)",
    "mamba2(norm=before)",
    "mamba2(init=fresh, state=5, heads=3)",
    "gated_deltanet",
    "gated_deltanet(init=fresh, conv=3)",
    "kda",
    "kda(init=fresh, conv=3)",
    "mamba",
    "mamba(state=3, expand=1, conv=2)",
    "short_conv",
    "short_conv(conv=4)",
)
NAMES = ("mamba2", "gated_deltanet", "mamba", "short_conv")


def name_of(call):
    return call.split("(")[0]


def lone(call, seed=1, **changes):
    """The mechanism of layer 1 of a tiny llama, with weights that are not at their start."""
    model = tiny("llama", seed=seed, **changes)
    mixer = part(swap(model, f"layer1:{call}", seed=seed))
    with torch.no_grad():
        for parameter in mixer.mixer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=gen(parameter.numel())))
    return mixer.eval()


def gen(seed):
    return torch.Generator().manual_seed(seed)


def stream(batch, length, seed=0):
    return torch.randn(batch, length, D_MODEL, generator=gen(seed))


def run(mixer, x, cache=None, mask=None):
    facts = TokenFacts(x.shape[1], None if mask is None else mask[:, -x.shape[1] :])
    return mixer(hidden_states=x, past_key_values=cache, token_facts=facts)[0]


def rows_after(mixer, x, mask=None):
    cache = DynamicCache()
    out = run(mixer, x, cache, mask)
    return out, cache.layers[1].rows
