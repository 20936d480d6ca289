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


def module(
    seed: int = 1, dtype=torch.float32, bias: bool = True, moved: bool = True, **settings
) -> Infini:
    """One Infini-attention with random gates, outside any model: H=4, KV=2, D=8, d_model=24.

    Args:
        moved: maps and what begins as zeros are as if they had been trained.
    """
    model = tiny("llama", seed=seed, attention_bias=bias).to(dtype)
    context = Context(layer=1, slot="attn", n_layers=3, d_model=24, model_config=model.config)
    original = Layout.of(model).blocks[1].self_attn
    built = Infini(original, InfiniConfig(**{"segment": N, **settings}), context).eval()
    built.rotary = model.model.rotary_emb
    with torch.no_grad():
        if "gate_init" not in settings:
            built.gate.copy_(torch.tensor([-1.0, 0.5, 2.0, -0.3]))
        torch.manual_seed(seed)
        for name, parameter in built.named_parameters():
            if moved and name in ("gate_x", "own_q", "own_k", "map_q", "map_k"):
                parameter.add_(0.2 * torch.randn_like(parameter))
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
    s = infini.settings
    q, k, v = infini.qkv(x)
    q_rot, k_rot = infini.rotate(q, k, infini.rotary(x, torch.arange(x.shape[1])[None]))
    if s.feature_map == "hedgehog":
        q = q + (x @ infini.own_q.T).unflatten(-1, (4, 8)).transpose(1, 2)
        k = k + (x @ infini.own_k.T).unflatten(-1, (2, 8)).transpose(1, 2)
    if s.memory_position == "far":
        apart = torch.full((1, 1), (s.overlap + 1) * s.segment)  # as the model turns that position
        q = infini.rotate(q, k, infini.rotary(x, apart))[0]
    learned = s.feature_map in ("learned", "hedgehog")
    log_c: list = [None] * len(x)
    if s.normalizer == "shared":
        log_c = [infini.gate[:, None] + infini.gate_x @ row.T for row in x]
    rows = [
        reference(
            q[b], k[b], v[b], q_rot[b], k_rot[b], infini.gate, segment=s.segment,
            scaling=infini.scaling, update=s.update, feature_map=s.feature_map, sinks=s.sinks,
            first_segment=s.first_segment, overlap=s.overlap, log_c=log_c[b],
            maps=(infini.map_q, infini.map_k) if learned else None,
            slots=(s.slots,) * 2 if isinstance(s.slots, int) else s.slots, slot_score=s.slot_score,
        )
        for b in range(len(x))
    ]  # fmt: skip
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


PAPER = [
    {},
    {"update": "delta"},
    {"first_segment": "local"},
    {"sinks": 3},
    {"sinks": 11, "update": "delta", "feature_map": "softmax", "first_segment": "local"},
    {"segment": 1, "update": "delta"},
]
"""As published, and with sinks and another map."""
FULL = {
    "overlap": 1, "normalizer": "shared", "feature_map": "hedgehog", "memory_position": "far",
}  # fmt: skip
VARIANTS = [
    *PAPER,
    {"overlap": 1},
    {"overlap": 2, "segment": 4, "sinks": 6, "first_segment": "local", "update": "delta"},
    {"normalizer": "shared", "sinks": 3},
    {"normalizer": "shared", "feature_map": "learned", "update": "delta"},
    {"memory_position": "far", "feature_map": "softmax"},
    {"feature_map": "hedgehog"},
    FULL,
    {**FULL, "overlap": 2, "segment": 5, "sinks": 7},
    {**FULL, "segment": 1, "overlap": 3, "sinks": 1},
    {"slots": 3, "slot_score": "recall_error", "update": "delta"},
    {"slots": (5, 0), "slot_score": "value_norm", "sinks": 2, "segment": 4},
    {**FULL, "segment": 4, "slots": (2, 6), "slot_score": "recall_error", "sinks": 1},
]
