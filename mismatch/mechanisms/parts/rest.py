"""What is let go, as one key: the far tokens that have no slot stand in the softmax as their mean.

    far(s)    sum of the keys, of the values, and number of the far tokens before segment s (no sinks)
    rest(s)   far(s) minus the tokens that are kept before segment s: n of them
    k = sum of keys / n        v = sum of values / n        its score is cap(scaling q.k) + log n

n keys that were all like their mean would weigh n exp(q.k) and give v: one key says that much of all of them, where
leaving them out moves their weight to the tokens that stayed. (By Jensen's inequality their true weight is larger.)
The sums cost one key and one value per kv head, in float32 at least, whatever the length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mismatch.mechanisms.parts.local_softmax import Kept, Pair
from mismatch.mechanisms.parts.segments import Grid


def with_rest(
    kept: Kept | None,
    own: Pair,
    earlier: Pair,
    grid: Grid,
    rows: dict[str, Tensor],
    sinks: int,
) -> tuple[Kept, dict[str, Tensor]]:
    """The chosen keys of each segment with the mean of the others behind them, and the rows for the next call.

    Args:
        kept: what is kept exactly; None = nothing.
        own: on the grid, `batch KV S width D`.
        earlier: before it, `batch KV overlap N D`.
        grid: where the tokens stand.
        rows: of the state before this call.
        sinks: first tokens, which are never let go.
    """
    overlap, device = earlier.k.shape[2], own.k.device
    begins = grid.starts(device) - overlap * grid.size  # of what a query reads whole
    far = (begins - sinks).clamp(min=0)[:, None]
    if kept is not None:
        exact = kept.log_count > -torch.inf
        far = far - exact.sum(-1)
    wide = torch.promote_types(own.k.dtype, torch.float32)
    log_count = far.to(wide).log()  # -inf where nothing was let go
    means, after = [], {}
    for name, at_hand, early, exact_ones in zip(
        ("far_k", "far_v"), own, earlier, (None, None) if kept is None else kept[:2], strict=True
    ):
        sums = _sums(at_hand, early, grid, rows.get(name), sinks)
        after[name] = grid.after(sums)
        rest = sums[:, :, : grid.count]
        if exact_ones is not None:
            rest = rest - exact_ones.to(rest.dtype).masked_fill(~exact[..., None], 0).sum(-2)
        means.append(rest / far.clamp(min=1)[..., None])
    k, v = (mean[:, :, :, None] for mean in means)
    log_count = log_count.expand(*k.shape[:3])[..., None]
    if kept is None:
        return Kept(k, v, log_count), after
    return Kept(
        torch.cat([kept.k.to(k.dtype), k], dim=3),
        torch.cat([kept.v.to(v.dtype), v], dim=3),
        torch.cat([kept.log_count.to(wide), log_count], dim=3),
    ), after


def _sums(own: Tensor, earlier: Tensor, grid: Grid, known: Tensor | None, sinks: int) -> Tensor:
    """Sum of the far tokens before segment 0 .. closed of the grid: `batch KV closed+1 D`."""
    wide = torch.promote_types(own.dtype, torch.float32)
    if known is None:
        known = own.new_zeros(*own.shape[:2], own.shape[-1], dtype=wide)
    if grid.closed == 0:
        return known[:, :, None]
    overlap = earlier.shape[2]
    leaving = torch.cat([earlier, own], dim=2)[:, :, : grid.closed].to(wide)
    first = (grid.start - overlap * grid.size)[:, None] + grid.size * torch.arange(grid.closed)
    number = (first[..., None] + torch.arange(grid.size)).to(own.device)
    counted = leaving.masked_fill((number < sinks)[:, None, ..., None], 0).sum(3)
    return torch.cat([known[:, :, None], counted], dim=2).cumsum(2)


def bytes_of(n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one row's sums."""
    return 2 * n_kv_heads * head_dim * torch.promote_types(dtype, torch.float32).itemsize
