"""How much attention a token gets from afar: the most that any later far query gives it, by kv head.

    p_ij   = softmax_j(cap(scaling q_i.k_j)) over all j <= i, and within the module's own window
    y_jh   = max of p_ij over the query heads of kv head h and all i whose segment lies more than `overlap` behind j's

A token that one query far behind needs has a large y, however little the others give it: what a score must foresee.
Blocks of queries at a time: memory is linear in the length.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES = 128
"""Queries worked on at once; a matter of speed and memory only."""


def far_attention(
    q: Tensor,
    k: Tensor,
    *,
    segment: int,
    overlap: int,
    sinks: int,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """y of whole texts without padding, `batch pos KV` in 0..1; NaN for a token that no query here is far from, and for
    sinks.

    Args:
        q, k: as the module's attention compares them (rotated), `batch H pos D` and `batch KV pos D`.
        segment, overlap, sinks: what a query reads whole.
        scaling, softcap, window: the module's own.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, length, _ = k.shape
    q, k = q.to(wide).unflatten(1, (heads, -1)), k.to(wide)
    number = torch.arange(length, device=k.device)
    far_from = (number // segment - overlap) * segment  # a query reads the tokens below as slots
    found = torch.zeros(batch, heads, length, dtype=wide, device=k.device)
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        i, j = number[start:end, None], number[:end]
        read = j <= i
        if window is not None:
            read = read & (i - j < window)
        logits = q[:, :, :, start:end] @ k[:, :, None, :end].transpose(-1, -2) * scaling
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        weights = logits.masked_fill(~read, torch.finfo(wide).min).softmax(-1)
        weights = weights * (j < far_from[start:end, None])
        found[:, :, :end] = torch.maximum(found[:, :, :end], weights.amax((2, 3)))
    judged = (number >= sinks) & (number < far_from[-1])
    return found.masked_fill(~judged, torch.nan).transpose(1, 2)
