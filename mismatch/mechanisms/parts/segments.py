"""Tokens in segments of N, however they are padded and fed.

A segment-wise mechanism has the same output whether a text comes whole, in chunks or token by token, alone or in a
padded batch, only if segments are counted from the first REAL token of each row. So tokens are laid on a grid: row by
row the real tokens that the open segment already holds, then the new ones, cut into segments of N. Pads are on no grid;
rows of one batch may be at different columns of their segments.

    grid columns   0 ........ fill | fill ....... fill + new | nothing
                   open segment      new tokens of this call          (fill < N, S segments of N)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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

    def before_open(self, segments: Tensor, count: int) -> Tensor:
        """Of `count` segments before the grid and those on it (`batch heads count+S N D`), the
        `count` before each row's open one: `batch heads count N D`."""
        if self.offset is not None:
            return segments[:, :, self.closed : self.closed + count].clone()
        row = torch.arange(segments.shape[0], device=segments.device)[:, None]
        at = (self.done[:, None] + torch.arange(count)).to(segments.device)
        return segments[row, :, at].movedim(1, 2)


def _fit(x: Tensor, columns: int) -> Tensor:
    """`batch heads any D` cut or filled with zeros to `columns`."""
    missing = columns - x.shape[2]
    if missing <= 0:
        return x[:, :, :columns]
    return torch.cat([x, x.new_zeros(*x.shape[:2], missing, x.shape[3])], dim=2)
