"""The tokens of one call in their rows, however they are padded and fed: for a window that slides by one.

A mechanism with a window of W tokens and a state behind it has the same output whether a text comes
whole, in chunks or token by token, alone or in a padded batch, only if pads take no column of a row. So
the tokens of a call are packed: row by row the last tokens that the window still holds, then the new
real ones.

    columns   0 ......... held | held ...... held + new | nothing
              in the window      new tokens of this call          (held <= W)

The new token r of every row stands in column held + r, and the token that leaves the window when it
comes in column held + r - W. Work is done in chunks of C new tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""C: new tokens worked on at once; a matter of speed and memory only."""


class PackedRows:
    """Where the new tokens of one call stand.

    Attributes:
        seen: int64 `batch` on the CPU, real tokens of each row before this call.
        new: int64 `batch` on the CPU, real tokens of this call.
        length: tokens of this call, pads included.
        held: columns before the first new token.
        size, count: C, and the chunks of this call.
    """

    def __init__(
        self,
        seen: Tensor | None,
        keep: Tensor | None,
        batch: int,
        length: int,
        window: int,
        device: Any,
    ) -> None:
        """
        Args:
            seen: real tokens of each row before this call, or None.
            keep: bool `batch length`, real tokens of this call; None = all.
            batch, length: of this call's input.
            window: W; 0 = none.
            device: of the tensors to be packed.
        """
        self.seen = torch.zeros(batch, dtype=torch.long) if seen is None else seen
        # The one place that waits for a GPU, and only under padding.
        self.new = torch.full((batch,), length) if keep is None else keep.sum(1).cpu()
        self.length, self.window = length, window
        self.held = min(window, int(self.seen.max()))
        self.size = min(CHUNK, length)
        self.count = -(-length // self.size)
        self.keep = keep
        self.order = (
            None if keep is None else keep.int().argsort(dim=1, descending=True, stable=True)
        )
        same = keep is None and bool((self.seen == self.seen[0]).all())
        rows = slice(1) if same else slice(None)  # rows that are alike share their masks
        self._seen, self._new = self.seen[rows].to(device), self.new[rows].to(device)

    def pack(self, x: Tensor) -> Tensor:
        """`batch heads pos D`: real tokens first."""
        if self.order is None:
            return x
        return x.gather(2, self.order[:, None, :, None].expand_as(x))

    def unpack(self, x: Tensor) -> Tensor:
        """Back to their positions; pads get zeros."""
        if self.keep is None:
            return x
        rank = (self.keep.cumsum(1) - 1).clamp(min=0)[:, None, :, None]
        return x.gather(2, rank.expand_as(x)).masked_fill(~self.keep[:, None, :, None], 0)

    def behind(self, x: Tensor, name: str, rows: dict[str, Tensor]) -> Tensor:
        """New tokens behind what the window holds: `batch heads held+pos D`."""
        if self.held == 0:
            return x
        # Of rows that were selected from a batch the longest may be gone.
        return torch.cat([rows[name][:, :, -self.held :], x], dim=2)

    def last(self, x: Tensor) -> Tensor:
        """What the window holds after this call: `batch heads columns D`; columns to the left of a
        row's own tokens hold anything."""
        columns = min(self.window, int((self.seen + self.new).max()))
        if self.keep is None:
            # Cloned: a view would keep all keys of this call alive in the cache.
            return x[:, :, x.shape[2] - columns :].clone()
        column = (self.held + self.new - columns)[:, None] + torch.arange(columns)
        column = column.clamp(min=0).to(x.device)[:, None, :, None]
        return x.gather(2, column.expand(-1, x.shape[1], -1, x.shape[3]))

    def first(self, x: Tensor, known: Tensor | None, columns: int) -> Tensor:
        """The first `columns` tokens of each row, of `known` and of this call's `x`; columns that
        have not come yet hold zeros."""
        if known is None:
            known = x.new_zeros(*x.shape[:2], columns, x.shape[3])
        if int(self.seen.min()) >= columns:
            return known
        rank = (torch.arange(columns) - self.seen[:, None]).to(x.device)
        is_new = (rank >= 0) & (rank < self.new[:, None].to(x.device))
        rank = rank.clamp(0, self.length - 1)[:, None, :, None]
        found = x.gather(2, rank.expand(-1, x.shape[1], -1, x.shape[3]))
        return torch.where(is_new[:, None, :, None], found, known)

    def leaving(self, x: Tensor) -> Tensor:
        """Of each new token the one that leaves the window when it comes: `batch heads held+pos D`
        -> `batch heads pos D`; zeros where none does."""
        return F.pad(x, (0, 0, min(self.window - self.held, self.length), 0))[:, :, : self.length]

    def clock(self, sinks: int) -> tuple[Tensor, Tensor]:
        """Which new tokens push one out of the window that is none of the first `sinks`, and how many
        new tokens have come: bool and int64 `batch or 1, chunks, C`."""
        step = torch.arange(self.count * self.size, device=self._seen.device)
        rank = self._seen[:, None] + step - self.window
        leaves = (step < self._new[:, None]) & (rank >= sinks)
        age = torch.minimum(step + 1, self._new[:, None])
        return tuple(x.unflatten(1, (self.count, self.size)) for x in (leaves, age))

    def chunks(self, x: Tensor) -> Tensor:
        """`batch heads pos any` -> `batch heads chunks C any`, zeros at the end."""
        missing = self.count * self.size - x.shape[2]
        return F.pad(x, (0, 0, 0, missing)).unflatten(2, (self.count, self.size))

    def for_each_chunk(self, x: Tensor) -> Tensor:
        """The same for all chunks: `batch heads any D` -> `batch heads chunks any D`."""
        return x[:, :, None].expand(-1, -1, self.count, -1, -1)

    @property
    def reach(self) -> int:
        """W, or all tokens there are if these are fewer."""
        return min(self.window, self.held + self.length)

    def windows(self, x: Tensor) -> Tensor:
        """What the queries of each chunk can see: `batch heads held+pos D` -> `batch heads chunks
        C+reach-1 D`."""
        if self.reach == 0:
            return x.new_zeros(*x.shape[:2], self.count, 0, x.shape[3])
        missing = self.reach - 1 - self.held  # negative: one column has just left every window
        tail = self.count * self.size - self.length
        x = F.pad(x, (0, 0, missing, tail))
        return x.unfold(2, self.size + self.reach - 1, self.size).transpose(-1, -2)

    def window_mask(self) -> Tensor:
        """Which of them each query sees: bool `batch or 1, chunks, C, C+reach-1`."""
        device = self._seen.device
        i = torch.arange(self.size, device=device)[:, None]
        j = torch.arange(self.size + self.reach - 1 if self.reach else 0, device=device)
        inside = (j >= i) & (j < i + self.reach)
        rank = self.size * torch.arange(self.count, device=device)[:, None] + j - self.reach + 1
        return inside & (self._seen[:, None, None] + rank >= 0)[:, :, None]

    def sink_mask(self, sinks: int) -> Tensor:
        """Which of the first tokens each query sees, those that its window has left behind: bool
        `batch or 1, chunks, C, sinks`."""
        step = torch.arange(self.count * self.size, device=self._seen.device)
        rank = (self._seen[:, None] + step).unflatten(1, (self.count, self.size))
        first = torch.arange(sinks, device=self._seen.device)
        return first <= rank[..., None] - self.window
