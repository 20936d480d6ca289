"""Softmax attention inside each segment by the module's own kernel, the first tokens of the text beside it.

The published forms of Infini-attention run through it, so that their numbers are those of the kernel to the bit. More
than one segment, chosen keys, or the logarithm of the denominator: `local_softmax`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mismatch.mechanisms.parts.local_softmax import Pair
from mismatch.mechanisms.parts.projections import AttentionParts
from mismatch.mechanisms.parts.segments import Grid


def segment_attention(
    attention: AttentionParts, q: Tensor, own: Pair, sinks: Pair | None, grid: Grid
) -> Tensor:
    """Causal softmax inside each segment, sinks first: `batch H S queries D`.

    Args:
        attention: whose kernel, scaling, softcap and window these are.
        q: `batch H S queries D`, the columns `grid.queries`.
        own: keys and values, `batch KV S width D`.
        sinks: of each row, `batch KV sinks D`.
    """
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, *own))
    j = torch.arange(grid.width, device=q.device)
    i = j[grid.queries, None]
    mask = None
    if sinks is not None or len(i) < grid.width or (attention.window or grid.width) < grid.width:
        causal = i >= j
        if attention.window is not None:
            causal = causal & (i - j < attention.window)
        mask = causal[None, None]
        if sinks is not None:
            first = torch.arange(sinks.k.shape[2], device=q.device)
            # A sink that stands in this very segment is seen as an ordinary token.
            earlier = first < grid.starts(q.device).flatten()[:, None]
            earlier = earlier[:, None, None].expand(-1, 1, len(i), -1)
            mask = torch.cat([earlier, mask.expand(len(earlier), -1, -1, -1)], dim=-1)
            k, v = (
                torch.cat([first_ones.repeat_interleave(grid.count, dim=0), x], dim=2)
                for first_ones, x in zip(sinks, (k, v), strict=True)
            )
    return attention.attend(q, k, v, mask).unflatten(0, (-1, grid.count)).transpose(1, 2)
