"""Tokens in segments of N, however they are padded and fed; and the cache entry of the open one.

A segment-wise mechanism gives the same output whether a text comes whole, in chunks or token by
token, alone or in a padded batch, only if segments are counted from the first REAL token of each
row. So tokens are laid on a grid: row by row the real tokens that the open segment already holds,
then the new ones, cut into segments of N. Pads are on no grid; rows of one batch may stand at
different places of their segments.

    grid columns   0 ........ fill | fill ....... fill + new | nothing
                   open segment      new tokens of this call          (fill < N, S segments of N)

What `generate()` does to a cache (reorder beams, repeat, select, reset) is done here to every row
of the state. It reports the true number of tokens, because transformers takes positions and mask
sizes from layer 0's entry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from mismatch.errors import SurgeryError


class SegmentState(CacheLayerMixin):
    """Cache entry of a segment-wise layer.

    Attributes:
        length: tokens seen, pads included (the host's count of positions).
        seen: int64 `batch` on the CPU, real tokens seen of each row; None before the first call.
        rows: the mechanism's own tensors by name, batch first.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.length = 0
        self.seen: Tensor | None = None
        self.rows: dict[str, Tensor] = {}
        self.is_initialized = False

    def advance(self, new: Tensor, length: int, rows: dict[str, Tensor]) -> None:
        """Count `new` real tokens per row and `length` positions, and keep the rows for the next
        call."""
        self.seen = new if self.seen is None else self.seen + new
        self.length += length
        self.rows = rows
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.seen = self.seen[indices.cpu()]
            self.rows = {name: x[indices.to(x.device)] for name, x in self.rows.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.seen = self.seen.repeat_interleave(repeats)
            self.rows = {name: x.repeat_interleave(repeats, dim=0) for name, x in self.rows.items()}

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise SurgeryError(
                "this cache cannot be cropped: a segment that went into the memory stays there",
                hint="generate without assisted decoding, prompt lookup or contrastive search",
            )

    def offload(self) -> None:
        """Nothing: the state is small and stays on the device."""

    def prefetch(self) -> None:
        """Nothing: see `offload`."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError(
            "a segment state is written by its mechanism, not through `update`"
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "a segment state is written by its mechanism, not through `update`"
        )


def entry(cache: Any, layer_idx: int) -> SegmentState:
    """The state of layer `layer_idx` in a transformers cache, put there on the first call.

    Raises:
        SurgeryError: a static cache, or an entry that another attention has already written.
    """
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, SegmentState):
        return layer
    if isinstance(layer, StaticLayer):
        raise SurgeryError(
            f"layer {layer_idx} keeps its own state and does not fit into a static cache",
            hint="generate with the default dynamic cache (no cache_implementation='static')",
        )
    if not isinstance(layer, DynamicLayer) or layer.get_seq_length() > 0:
        raise SurgeryError(
            f"layer {layer_idx} of this cache ({type(layer).__name__}, {layer.get_seq_length()} "
            "tokens) was written by another attention",
            hint="a cache belongs to one model: start the student with an empty one",
        )
    cache.layers[layer_idx] = SegmentState()
    return cache.layers[layer_idx]


class Grid:
    """Where the new tokens of one call stand in the segments of their rows.

    Attributes:
        count: S, segments on the grid.
        width: columns of a segment: N, or fewer where one segment holds everything.
        queries: the columns of a segment that hold a new token: a slice, all of them when count >
            1.
        done: int64 `batch` on the CPU, segments of the grid that are complete in each row.
        closed: max of `done`.
        start: int64 `batch`, the number (from the row's first real token) of the grid's first
            column.
    """

    def __init__(
        self,
        seen: Tensor | None,
        keep: Tensor | None,
        batch: int,
        length: int,
        size: int,
        device: Any,
    ) -> None:
        """
        Args:
            seen: real tokens of each row before this call, or None.
            keep: bool `batch length`, real tokens of this call; None = all.
            batch, length: of this call's input.
            size: N.
            device: of the tensors to be placed.
        """
        seen = torch.zeros(batch, dtype=torch.long) if seen is None else seen
        self.fill = seen % size
        # The one place that waits for a GPU, and only under padding.
        self.new = torch.full((batch,), length) if keep is None else keep.sum(1).cpu()
        total = self.fill + self.new
        self.seen, self.start, self.size, self.length = seen, seen - self.fill, size, length
        self.done, self.left = total // size, total % size
        self.closed = int(self.done.max())
        end = int(total.max())
        self.count = max(1, -(-end // size))
        self.width = size if self.count > 1 else max(1, end)
        first = int(self.fill.min()) if self.count == 1 else 0
        self.queries = slice(min(first, self.width - 1), self.width)
        same = keep is None and bool((self.fill == self.fill[0]).all())
        self.offset: int | None = int(self.fill[0]) if same else None
        rank = (
            torch.arange(length).expand(batch, -1).to(device)
            if keep is None
            else keep.cumsum(1) - 1
        )
        self.keep, self.rank = keep, rank

    def _columns(self, base: Tensor, width: int) -> Tensor:
        """int64 `batch pos`: `base + rank` of each token, and `width` (one past the end) for pads
        and what lies beyond."""
        column = (base.to(self.rank.device)[:, None] + self.rank).clamp(max=width)
        return column if self.keep is None else column.masked_fill(~self.keep, width)

    def scatter(self, into: Tensor, x: Tensor, base: Tensor) -> Tensor:
        """Tokens into columns of their rows: `into` `batch heads columns D` with x `batch heads pos
        D` at base + rank. Tokens that fall beyond the last column are left out."""
        width = into.shape[2]
        column = self._columns(base, width)[:, None, :, None].expand_as(x)
        room = torch.cat([into, into.new_zeros(*into.shape[:2], 1, into.shape[3])], dim=2)
        return room.scatter(2, column, x)[:, :, :width]

    def place(self, x: Tensor, opened: Tensor | None = None) -> Tensor:
        """`batch heads pos D` -> `batch heads S width D`, behind what the open segment holds
        (`batch heads any D`)."""
        columns = self.count * self.width
        if opened is None:
            opened = x.new_zeros(*x.shape[:2], 0, x.shape[3])
        if self.offset is not None:
            opened = _fit(opened, self.offset)
            flat = _fit(torch.cat([opened, x], dim=2), columns)
        else:
            flat = self.scatter(_fit(opened, columns), x, self.fill)
        return flat.unflatten(2, (self.count, self.width))

    def take(self, y: Tensor) -> Tensor:
        """Grid rows back to tokens: `batch heads S queries D` -> `batch heads pos D`; pads get
        zeros."""
        flat = y.flatten(2, 3)
        skipped = self.queries.start
        if self.offset is not None:
            return flat[:, :, self.offset - skipped :][:, :, : self.length]
        width = flat.shape[2]
        column = self._columns(self.fill - skipped, width)[:, None, :, None]
        return _fit(flat, width + 1).gather(2, column.expand(-1, y.shape[1], -1, y.shape[-1]))

    def rest(self, placed: Tensor) -> Tensor:
        """What the open segment of each row holds after this call: `batch heads columns D`, columns
        = the most of any row; columns behind a row's own tokens hold anything."""
        flat, most = placed.flatten(2, 3), int(self.left.max())
        if self.offset is not None:
            # Cloned: a view would keep the whole grid of this call alive in the cache.
            return flat[:, :, self.closed * self.size :][:, :, :most].clone()
        column = (self.done * self.size)[:, None] + torch.arange(most)
        column = column.clamp(max=flat.shape[2] - 1).to(flat.device)[:, None, :, None]
        return flat.gather(2, column.expand(-1, flat.shape[1], -1, flat.shape[3]))

    def starts(self, device: Any) -> Tensor:
        """int64 `batch S`: the number in its row of each segment's first token."""
        return (self.start[:, None] + self.size * torch.arange(self.count)).to(device)

    def after(self, stack: Tensor) -> Tensor:
        """Of states before segment 0 .. closed (`batch heads closed+1 ...`) each row's last: `batch
        heads ...`."""
        if self.offset is not None:
            return stack[:, :, self.closed].clone()
        row = torch.arange(stack.shape[0], device=stack.device)
        return stack[row, :, self.done.to(stack.device)]


def _fit(x: Tensor, columns: int) -> Tensor:
    """`batch heads any D` cut or filled with zeros to `columns`."""
    missing = columns - x.shape[2]
    if missing <= 0:
        return x[:, :, :columns]
    return torch.cat([x, x.new_zeros(*x.shape[:2], missing, x.shape[3])], dim=2)
