"""One linear attention with random new parameters outside any model, for tests of the mechanism itself."""

from __future__ import annotations

import torch
from lone_infini import stream
from reference_linear_attention import reference
from tiny_models import tiny

from mismatch.mechanisms.base import Context
from mismatch.mechanisms.linear_attention import LinearAttention, LinearAttentionConfig
from mismatch.models.layout import Layout

VARIANTS = [
    {},
    {"feature_map": "elu"},
    {"feature_map": "relu", "decay": "learned"},
    {"feature_map": "exp"},
    {"feature_map": "learned", "decay": "learned"},
    {"decay": "learned"},
    {"sinks": 2},
    {"window": 1},
    {"window": 3, "feature_map": "softmax"},
    {"window": 6, "sinks": 2, "decay": "learned"},
    {"window": 5, "sinks": 7, "feature_map": "learned"},
    {"feature_map": "codebook", "codes": 5},
    {"feature_map": "codebook", "codes": 7, "window": 3, "sinks": 1, "decay": "learned"},
]


TEXT = stream(2, 60, seed=11)


def module(
    seed: int = 1,
    dtype=torch.float32,
    family: str = "llama",
    draw: bool = True,
    text=TEXT,
    **settings,
) -> LinearAttention:
    """Layer 1: H=4, KV=2, D=8, d_model=24. A codebook is that of the inputs `text`."""
    model = tiny(family, seed=seed).to(dtype)
    context = Context(layer=1, slot="attn", n_layers=3, d_model=24, model_config=model.config)
    calibrator = LinearAttention.calibrator(LinearAttentionConfig(**settings))
    if calibrator is not None and text is not None:
        calibrator.update(text.to(dtype), text, torch.ones(text.shape[:2], dtype=torch.bool))
        context.calibration = calibrator
    original = Layout.of(model).blocks[1].self_attn
    built = LinearAttention(original, LinearAttentionConfig(**settings), context).eval()
    built.rotary = model.model.rotary_emb
    theirs = {id(p) for p in original.parameters()}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if draw and id(weight) not in theirs:
                noise = torch.randn(weight.shape, generator=generator).to(dtype)
                weight.copy_(noise if name in ("mix", "decay") else weight + 0.3 * noise)
    return built


def by_definition(linear, x):
    """Heads and memory of each row, from the reference."""
    bare_q, bare_k, v = linear.qkv(x)
    q, k = linear.rotate(bare_q, bare_k, linear.rotary(x, torch.arange(x.shape[1])[None]))
    maps = {
        f"{side}_{name}": value
        for side, part in (("q", linear.map_q), ("k", linear.map_k))
        for name, value in part.named_parameters()
    }
    s = linear.settings
    rows = [
        reference(
            q[b], k[b], v[b], maps, feature_map=s.feature_map, scaling=linear.scaling,
            window=s.window, sinks=s.sinks, softcap=linear.softcap, own_window=linear.window,
            g=torch.sigmoid(linear.decay.double()) if s.decay == "learned" else None,
            mu=torch.sigmoid(linear.mix.double()) if s.window or s.sinks else None,
            bare=(bare_q[b], bare_k[b]),
        )
        for b in range(len(x))
    ]  # fmt: skip
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))
