"""Linear attention and its hybrid as the definition reads: one row, one head, one pair of tokens at a time, float64.

Slow, and it shares nothing with the fast path but the projections and the values of the parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor


def phi(x: Tensor, name: str, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """One vector, `D` -> `features`."""
    if weight is not None:
        x = weight @ x
    if bias is not None:
        x = x + bias
    if name == "elu":
        return torch.nn.functional.elu(x) + 1
    if name in ("relu", "learned"):
        return torch.maximum(x, torch.zeros_like(x))
    if name == "exp":
        return torch.cat([torch.exp(x) / torch.exp(x).max(), torch.exp(-x) / torch.exp(-x).max()])
    both = torch.cat([torch.exp(x), torch.exp(-x)])
    return both / both.sum()


def nearness(k: Tensor, codes: Tensor, log_t: Tensor) -> Tensor:
    """How much of a key, `D`, each code counts for: `codes`, sum 1."""
    away = torch.stack([((k - code) ** 2).sum() for code in codes]) / (2 * torch.exp(log_t))
    like = torch.exp(away.min() - away)
    return like / like.sum()


def reference(
    q: Tensor, k: Tensor, v: Tensor, maps: dict[str, Tensor], *, feature_map: str, scaling: float,
    window: int = 0, sinks: int = 0, g: Tensor | None = None, mu: Tensor | None = None,
    softcap: float | None = None, own_window: int | None = None,
    bare: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One row of real tokens.

    Args:
        q: `H pos D`, rotated; k, v: `KV pos D`, k rotated.
        maps: `q_weight` `H D D`, `q_bias` `H D`, and so for k (KV), as far as the map has them; of a codebook
            `k_codes` `KV codes D` and `k_spread` `KV`.
        g: decay, `KV`. mu: weight of the softmax, `H`.
        bare: q and k before the rotation, which a codebook reads.

    Returns:
        heads `H pos D`; S and z after the last token side by side, `KV features D+1`.
    """
    q, k, v = q.double(), k.double(), v.double()
    maps = {name: x.double() for name, x in maps.items()}
    n_heads, length, _ = q.shape
    group = n_heads // len(k)
    if own_window is not None and own_window <= window:
        window, linear = own_window, False
    else:
        linear = True

    by_codes = feature_map == "codebook"
    far_q, far_k = (x.double() for x in bare) if by_codes and bare is not None else (q, k)

    def cap(logit: Tensor) -> Tensor:
        return logit if softcap is None else softcap * torch.tanh(logit / softcap)

    def mapped(x: Tensor, side: str, head: int) -> Tensor:
        if by_codes and side == "k":
            return nearness(x, maps["k_codes"][head], maps["k_spread"][head])
        if by_codes:
            return torch.exp(cap(scaling * maps["k_codes"][head // group] @ x))
        own = {kind: maps[f"{side}_{kind}"][head] for kind in ("weight", "bias")
               if f"{side}_{kind}" in maps}  # fmt: skip
        return phi(x, feature_map, **own)

    heads, memories = [], []
    for h in range(n_heads):
        kv, row = h // group, []
        keys = [mapped(far_k[kv, j], "k", kv) for j in range(length)]
        beside = 1 - mu[h].double() if by_codes and mu is not None else 1.0
        fade = torch.ones((), dtype=torch.float64) if g is None else g[kv].double()
        for n in range(length):
            near = [j for j in range(n + 1) if n - j < window or j < sinks]
            far = sorted(set(range(n + 1)) - set(near)) if linear else []
            query = mapped(far_q[h, n], "q", h)
            sums = torch.zeros(v.shape[-1], dtype=torch.float64)
            weights = torch.zeros((), dtype=torch.float64)
            if near:
                logits = cap(torch.stack([scaling * (q[h, n] * k[kv, j]).sum() for j in near]))
                most = 0.0 if by_codes else logits.max()
                for j, weight in zip(near, torch.exp(logits - most), strict=True):
                    sums = sums + mu[h].double() * weight * v[kv, j]
                    weights = weights + mu[h].double() * weight
            for j in far:
                weight = beside * fade ** (n - window - j) * (query * keys[j]).sum()
                sums = sums + weight * v[kv, j]
                weights = weights + weight
            row.append(sums / weights if weights > 0 else sums)
        heads.append(torch.stack(row))
        if h % group == 0:
            last = length - 1
            memory = torch.zeros(len(keys[0]), v.shape[-1] + 1, dtype=torch.float64)
            for j in range(sinks, length - window):
                pair = torch.cat([v[kv, j], torch.ones(1, dtype=torch.float64)])
                memory = memory + fade ** (last - window - j) * torch.outer(keys[j], pair)
            memories.append(memory)
    return torch.stack(heads), torch.stack(memories)
