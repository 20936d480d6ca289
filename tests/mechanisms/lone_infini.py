"""One Infini-attention with random gates outside any model, for tests of the mechanism itself."""

from __future__ import annotations

import functools

import torch
from reference_infini import reference
from tiny_models import tiny
from transformers import DynamicCache

from mismatch.mechanisms.base import Context
from mismatch.mechanisms.infini import Infini, InfiniConfig
from mismatch.mechanisms.parts.own_state import OwnState
from mismatch.models.layout import Layout

N = 8
OFF, ON = -1e9, 1e9  # gates: local attention alone, memory alone
LENGTHS = (1, 5, N, 2 * N, 3 * N + 1, 30)


@functools.cache
def llama():
    return tiny("llama")


def module(seed: int = 1, dtype=torch.float32, bias: bool = True, **settings) -> Infini:
    """One Infini-attention with random gates, outside any model: H=4, KV=2, D=8, d_model=24."""
    model = tiny("llama", seed=seed, attention_bias=bias).to(dtype)
    context = Context(layer=1, slot="attn", n_layers=3, d_model=24, model_config=model.config)
    original = Layout.of(model).blocks[1].self_attn
    built = Infini(original, InfiniConfig(**{"segment": N, **settings}), context).eval()
    built.rotary = model.model.rotary_emb
    with torch.no_grad():
        if "gate_init" not in settings:
            built.gate.copy_(torch.tensor([-1.0, 0.5, 2.0, -0.3]))
    return built


def run(infini, x, offset=0, cache=None, ids=None, mask=None):
    ids = torch.arange(offset, offset + x.shape[1])[None] if ids is None else ids
    return infini(
        hidden_states=x,
        position_embeddings=infini.rotary(x, ids),
        past_key_values=cache,
        attention_mask=mask,
    )[0]


def stream(batch, length, seed=0, dtype=torch.float32):
    return torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)


def state_after(infini, x, chunks=None) -> OwnState:
    cache, start = DynamicCache(), 0
    for size in chunks or [x.shape[1]]:
        run(infini, x[:, start : start + size], offset=start, cache=cache)
        start += size
    return cache.layers[1]


def by_definition(infini, x):
    """Heads, memory and norm of each row, from the reference."""
    q, k, v = infini.qkv(x)
    ids = torch.arange(x.shape[1])[None]
    q_rot, k_rot = infini.rotate(q, k, infini.rotary(x, ids))
    s = infini.settings
    rows = [
        reference(
            q[b], k[b], v[b], q_rot[b], k_rot[b], infini.gate, segment=s.segment,
            scaling=infini.scaling, update=s.update, feature_map=s.feature_map, sinks=s.sinks,
            first_segment=s.first_segment,
        )
        for b in range(len(x))
    ]  # fmt: skip
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


VARIANTS = [
    {},
    {"update": "delta"},
    {"first_segment": "local"},
    {"sinks": 3},
    {"sinks": 11, "update": "delta", "feature_map": "softmax", "first_segment": "local"},
    {"segment": 1, "update": "delta"},
]
