"""Exact softmax attention near each query: its own segment, the segments before it, the first tokens, and chosen ones.

A query of segment s reads, in one softmax with the module's own scaling and softcap,

    own       its segment, causally                                            N keys
    earlier   the `overlap` segments before it                                 overlap N keys
    sinks     the first tokens of the text, once their segment lies behind these
    kept      chosen keys that somebody else found for segment s, by kv head   C keys

    out = sum_j exp(l_j) v_j / sum_j exp(l_j)          lse = log sum_j exp(l_j)          l = cap(scaling q.k) + log n

n is 1, but for a kept key that stands for n tokens.

With lse a mechanism joins another read of the text to this one under a shared normaliser. The module's own sliding
window bounds own and earlier keys; a sink and a kept key are read beyond it. A sink inside the segments that are read
is an ordinary token. All in float32 at least; memory is linear in the length.

What stands before the open segment travels from call to call as rows of the state: `rows_after` makes them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mismatch.mechanisms.parts.segments import Grid


class Pair(NamedTuple):
    """Keys (rotated) and values that belong together, of one shape."""

    k: Tensor
    v: Tensor


class Kept(NamedTuple):
    """Chosen keys and values before each segment of the grid.

    Attributes:
        k, v: `batch KV S C D`.
        log_count: `batch KV S C`, log of how many tokens each stands for; -inf where there is none, which holds
            anything finite.
    """

    k: Tensor
    v: Tensor
    log_count: Tensor


def local_softmax(
    q: Tensor,
    own: Pair,
    grid: Grid,
    *,
    scaling: float,
    earlier: Pair | None = None,
    sinks: Pair | None = None,
    kept: Kept | None = None,
    softcap: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of the new tokens of one call.

    Args:
        q: `batch H S queries D`, the columns `grid.queries`; query head h reads kv head h // (H / KV).
        own: keys and values on the grid, `batch KV S width D`.
        grid: where they stand.
        scaling, softcap: of the scores.
        earlier: the segments before the first of the grid, `batch KV overlap N D`; None = no overlap.
        sinks: the first tokens of each row, `batch KV sinks D`; those that have not come hold anything finite.
        kept: see `Kept`. Its keys must lie before the earlier segments and not among the sinks, or they count twice.
        window: tokens that a query reads of own and earlier, itself included; None = all.
        dropout: of the weights.

    Returns:
        out `batch H S queries D` and lse `batch H S queries`, in float32 at least.
    """
    overlap = 0 if earlier is None else earlier.k.shape[2]
    keys = [_reached(own.k, None if earlier is None else earlier.k)]
    values = [_reached(own.v, None if earlier is None else earlier.v)]
    masks = [_near_mask(grid, overlap, window, q.device)]
    if sinks is not None and sinks.k.shape[2]:
        keys.insert(0, _for_each_segment(sinks.k, grid))
        values.insert(0, _for_each_segment(sinks.v, grid))
        masks.insert(0, _sink_mask(grid, overlap, sinks.k.shape[2], q.device))
    if kept is not None and kept.k.shape[3]:
        keys.insert(0, kept.k)
        values.insert(0, kept.v)
        masks.insert(0, (kept.log_count > -torch.inf)[:, :, :, None])
    wide = torch.promote_types(torch.promote_types(q.dtype, own.v.dtype), torch.float32)
    k, v = torch.cat(keys, dim=3).to(wide), torch.cat(values, dim=3).to(wide)
    # The query heads of one kv head side by side: `batch KV S group*queries D`.
    rows = q.to(wide).unflatten(1, (k.shape[1], -1)).transpose(2, 3)
    group, queries = rows.shape[3:5]
    logits = (rows.flatten(3, 4) @ k.transpose(-1, -2) * scaling).unflatten(3, (group, queries))
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if kept is not None:
        more = kept.log_count.to(wide)[:, :, :, None, None]
        logits = logits + F.pad(more, (0, logits.shape[-1] - more.shape[-1]))
    logits = logits.masked_fill(~_joined(masks, queries), torch.finfo(wide).min)
    top = logits.detach().amax(-1, keepdim=True)  # every query reads itself: it is finite
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    if dropout:
        weights = F.dropout(weights, dropout)
    out = (weights.flatten(3, 4) @ v).unflatten(3, (group, queries)) / total
    lse = (top + total.log())[..., 0]
    return out.transpose(2, 3).flatten(1, 2), lse.transpose(2, 3).flatten(1, 2)


def first_tokens(x: Tensor, known: Tensor | None, count: int, grid: Grid) -> Tensor:
    """The first `count` real tokens of each row, `batch KV count D`; those that have not come are zeros.

    Args:
        x: of this call, `batch KV pos D`.
        known: what the last call found, or None.
    """
    if known is None:
        known = x.new_zeros(*x.shape[:2], count, x.shape[3])
    if int(grid.seen.min()) >= count:
        return known
    return grid.scatter(known, x, grid.seen).clone()  # not a view of something larger


def earlier_before(rows: Tensor | None, placed: Tensor, overlap: int, size: int) -> Tensor:
    """The `overlap` segments before the grid, `batch heads overlap N D`: `rows` of the state, zeros in the first
    call."""
    if rows is not None:
        return rows
    return placed.new_zeros(*placed.shape[:2], overlap, size, placed.shape[-1])


def earlier_after(earlier: Tensor, placed: Tensor, grid: Grid) -> Tensor:
    """The same for the next call: the `overlap` segments before each row's open one.

    Args:
        earlier: before this call, `batch heads overlap N D`.
        placed: on the grid, `batch heads S width D`.
    """
    overlap = earlier.shape[2]
    if grid.closed == 0 or overlap == 0:
        return earlier
    return grid.before_open(torch.cat([earlier, placed], dim=2), overlap)


def _reached(own: Tensor, earlier: Tensor | None) -> Tensor:
    """`batch KV S width D` -> `batch KV S overlap*N+width D`, the segments before each one first."""
    if earlier is None or earlier.shape[2] == 0:
        return own
    if own.shape[2] == 1:  # may be narrower than a whole segment
        return torch.cat([earlier.flatten(2, 3)[:, :, None], own], dim=3)
    overlap = earlier.shape[2]
    runs = torch.cat([earlier, own], dim=2).unfold(2, overlap + 1, 1)
    return runs.movedim(-1, 3).flatten(3, 4)


def _for_each_segment(x: Tensor, grid: Grid) -> Tensor:
    return x[:, :, None].expand(-1, -1, grid.count, -1, -1)


def _behind(grid: Grid, overlap: int, device: torch.device) -> Tensor:
    """int64 `batch or 1, S`: tokens of the row that lie before own and earlier segments; < 0 where earlier segments
    have not come."""
    starts = grid.starts(device) - overlap * grid.size
    # Rows that are alike share their masks.
    return starts if grid.offset is None else starts[:1]


def _near_mask(grid: Grid, overlap: int, window: int | None, device: torch.device) -> Tensor:
    """Own and earlier keys: bool `batch or 1, 1, S, queries, overlap*N+width`."""
    before = overlap * grid.size
    j = torch.arange(before + grid.width, device=device)
    i = before + torch.arange(grid.width, device=device)[grid.queries, None]
    read = j <= i
    if window is not None:
        read = read & (i - j < window)
    come = _behind(grid, overlap, device)[..., None] + j >= 0
    return (come[:, :, None] & read)[:, None]


def _sink_mask(grid: Grid, overlap: int, sinks: int, device: torch.device) -> Tensor:
    """bool `batch or 1, 1, S, 1, sinks`."""
    first = torch.arange(sinks, device=device)
    return (first < _behind(grid, overlap, device)[..., None])[:, None, :, None]


def _joined(masks: list[Tensor], queries: int) -> Tensor:
    """`batch or 1, KV or 1, S, 1, queries, keys`."""
    batch, heads = (max(mask.shape[at] for mask in masks) for at in (0, 1))
    alike = [mask.expand(batch, heads, -1, queries, -1) for mask in masks]
    return torch.cat(alike, dim=-1)[:, :, :, None]
