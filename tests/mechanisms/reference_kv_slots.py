"""kv_slots as the definition reads: for each query the list of tokens that it reads, and one softmax over them.

One row of real tokens at a time, the choice over the whole text anew for each query; no segments are formed, nothing is
merged. It shares the projections, the rotation and the net's weights with the fast path, nothing else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scores_of(mechanism, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`KV pos`, for x `pos d_model`, k and v `KV pos D`."""
    kind = mechanism.settings.slot_score
    heads, length = k.shape[:2]
    if kind == "first":
        return torch.zeros(heads, length)
    if kind == "recent":
        return torch.arange(length).expand(heads, length)
    if kind == "random":
        rows = [[mixed(n + mechanism.choice.seed, h) for n in range(length)] for h in range(heads)]
        return torch.tensor(rows)
    if kind == "learned":
        net = mechanism.score_net()
        hidden = x @ net.into.weight.T + net.into.bias
        found = (hidden * torch.sigmoid(hidden)) @ net.out.weight.T + net.out.bias
        found = found.T
    else:
        found = (v if kind == "value_norm" else k).square().sum(-1).sqrt().log()
        found = -found if kind == "short_key" else found
    return torch.round(found * 1024) / 1024


def mixed(number: int, head: int) -> int:
    """The finaliser of MurmurHash3 over 32 bits, its upper 24."""
    h = (number + 0x9E3779B9 * (head + 1)) % 2**32
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    return (h ^ (h >> 16)) >> 8


def read_by(t: int, scores: list[float], *, segment: int, overlap: int, sinks: int, slots: int):
    """The tokens that query t reads in a kv head with these scores, in no order: near ones, and far ones."""
    whole = max(0, (t // segment - overlap) * segment)
    far = [j for j in range(whole) if j >= sinks]
    best = sorted(far, key=lambda j: (-scores[j], j))[:slots]
    return list(range(whole, t + 1)), list(range(min(sinks, whole))) + best


def reference(mechanism, x: Tensor, embeddings) -> Tensor:
    """Output of one text, `pos d_model` -> `pos d_model`."""
    q, k, v = mechanism.qkv(x[None])
    q, k = mechanism.rotate(q, k, embeddings)
    config = mechanism.settings
    if config.kv_dtype is not None:
        k, v = (held_in(config.kv_dtype, each) for each in (k, v))
    q, k, v = q[0], k[0], v[0]
    scores = scores_of(mechanism, x, k, v)
    counts = config.slots
    counts = (counts,) * len(k) if isinstance(counts, int) else counts
    heads = torch.zeros_like(q)
    for h in range(len(q)):
        kv = h // (len(q) // len(k))
        for t in range(q.shape[1]):
            near, far = read_by(
                t, scores[kv].tolist(), segment=config.segment, overlap=config.overlap,
                sinks=config.sinks, slots=counts[kv],
            )  # fmt: skip
            near = [j for j in near if mechanism.window is None or t - j < mechanism.window]
            whole = max(0, (t // config.segment - config.overlap) * config.segment)
            gone = [j for j in range(config.sinks, whole) if j not in far]
            keys, values, times = k[kv, far + near], v[kv, far + near], torch.ones(len(far + near))
            if config.rest == "mean" and gone:
                keys = torch.cat([keys, k[kv, gone].mean(0, keepdim=True)])
                values = torch.cat([values, v[kv, gone].mean(0, keepdim=True)])
                times = torch.cat([times, torch.tensor([float(len(gone))])])
            logits = keys @ q[h, t] * mechanism.scaling
            if mechanism.softcap is not None:
                logits = mechanism.softcap * torch.tanh(logits / mechanism.softcap)
            heads[h, t] = (logits + times.to(logits).log()).softmax(0) @ values
    return mechanism.project(heads[None])[0]


def held_in(name: str, x: Tensor) -> Tensor:
    """Keys or values as they are read of a state that holds them so."""
    if name != "mxint8":
        return x.to(getattr(torch, name)).to(x.dtype)
    found = x.detach().clone(memory_format=torch.contiguous_format)
    for vector in found.view(-1, x.shape[-1]):
        for block in vector.split(32):
            step = 2.0 ** (math.floor(math.log2(max(block.abs().max().item(), 1e-30))) - 6)
            block.copy_(
                torch.tensor([step * max(-127, min(127, round(n / step))) for n in block.tolist()])
            )
    return found


def far_target(q: Tensor, k: Tensor, *, segment, overlap, sinks, scaling) -> Tensor:
    """`pos KV` of one text, `heads pos D`; NaN where nothing is far."""
    length, group = q.shape[1], len(q) // len(k)
    found = torch.full((length, len(k)), math.nan, dtype=q.dtype)
    for kv in range(len(k)):
        for i in range(length):
            for h in range(kv * group, (kv + 1) * group):
                weights = (k[kv, : i + 1] @ q[h, i] * scaling).softmax(0)
                for j in range(sinks, max(0, (i // segment - overlap) * segment)):
                    found[j, kv] = max(0.0 if found[j, kv].isnan() else found[j, kv], weights[j])
    return found
