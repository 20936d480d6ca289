"""Infini-attention as the definition reads: one row, one head, one token at a time, float64.

Slow, and it shares nothing with the fast path but the projections.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sigma(x: Tensor, feature_map: str, matrix: Tensor | None = None) -> Tensor:
    if feature_map == "elu":
        return torch.nn.functional.elu(x) + 1
    if matrix is not None:
        x = matrix.double() @ x
    return torch.softmax(torch.cat([x, -x]), 0)


def reference(
    q: Tensor, k: Tensor, v: Tensor, q_rot: Tensor, k_rot: Tensor, gate: Tensor, *,
    segment: int, scaling: float, update: str = "linear", feature_map: str = "elu",
    sinks: int = 0, first_segment: str = "blend", overlap: int = 0, log_c: Tensor | None = None,
    maps: tuple[Tensor, Tensor] | None = None, slots: tuple[int, ...] = (), slot_score: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One row of real tokens.

    Args:
        q, q_rot: `H pos D`; k, v, k_rot: `KV pos D`, for the memory and for the softmax.
        gate: `H`.
        log_c: `H pos`, the weight of the memory under one denominator; None = the gate blends.
        maps: W of queries `H D D` and of keys `KV D D`.
        slots: of each kv head; of the scores `value_norm` and `recall_error`.

    Returns:
        heads `H pos D`, and memory `KV features D`, norm `KV features` of what the softmax of a next
        segment would have left behind.
    """

    def score_of(key: Tensor, value: Tensor, memory: Tensor, norm: Tensor) -> float:
        if slot_score == "value_norm":
            return round(value.norm().log().item() * 1024) / 1024
        phi = sigma(key, feature_map, w_k)
        known = (phi @ memory) / (phi @ norm) if norm.sum() > 0 else 0.0
        return round((value - known).norm().item() * 1024) / 1024

    q, k, v, q_rot, k_rot, gate = (x.double() for x in (q, k, v, q_rot, k_rot, gate))
    n_heads, length, _ = q.shape
    group = n_heads // k.shape[0]
    out = [[None] * length for _ in range(n_heads)]
    memories, norms = [], []
    for kv in range(k.shape[0]):
        w_k = None if maps is None else maps[1][kv]
        features = len(sigma(k[kv, 0], feature_map, w_k))
        memory = torch.zeros(features, v.shape[-1], dtype=torch.float64)
        norm = torch.zeros(features, dtype=torch.float64)
        scores: dict[int, float] = {}  # of far tokens
        for start in range(0, length, segment):
            end = min(start + segment, length)
            low = max(0, start - overlap * segment)
            best = sorted(scores, key=lambda j: (-scores[j], j))[: slots[kv] if slots else 0]
            for t in range(start, end):
                for h in range(kv * group, (kv + 1) * group):
                    seen = [j for j in range(min(sinks, low))] + best + list(range(low, t + 1))
                    logits = torch.stack([scaling * q_rot[h, t] @ k_rot[kv, j] for j in seen])
                    local = torch.softmax(logits, 0) @ v[kv, seen]
                    phi = sigma(q[h, t], feature_map, None if maps is None else maps[0][h])
                    if log_c is not None:
                        near, c = logits.exp(), log_c[h, t].double().exp()
                        above = near @ v[kv, seen] + c * (phi @ memory)
                        out[h][t] = above / (near.sum() + c * (phi @ norm))
                        continue
                    g = torch.sigmoid(gate[h])
                    if low == 0:
                        keeps = 1.0 if first_segment == "local" else 1 - g
                        out[h][t] = keeps * local
                    else:
                        out[h][t] = g * (phi @ memory) / (phi @ norm) + (1 - g) * local
            old = start - overlap * segment  # the segment that the next one leaves behind
            if end - start == segment and old >= 0:
                before, before_norm = memory, norm
                for t in range(old, old + segment):
                    if any(slots) and t >= sinks:
                        scores[t] = score_of(k[kv, t], v[kv, t], before, before_norm)
                    if log_c is not None and t < sinks:
                        continue
                    phi = sigma(k[kv, t], feature_map, w_k)
                    known = 0.0
                    if update == "delta" and before_norm.sum() > 0:
                        known = (phi @ before) / (phi @ before_norm)
                    memory = memory + torch.outer(phi, v[kv, t] - known)
                    norm = norm + phi
        memories.append(memory)
        norms.append(norm)
    heads = torch.stack([torch.stack(row) for row in out])
    return heads, torch.stack(memories), torch.stack(norms)
