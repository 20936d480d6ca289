"""Softmax attention over the host's KV cache, by a mechanism that makes other queries, keys and values for it, or
chooses what a query reads.

    made        queries, and what the cache holds of the new tokens; the family's own unless a subclass makes others
    the cache   the host's, of its kind and size
    read        the heads, from queries and all that is cached; softmax attention unless a subclass reads otherwise

Which keys a query may read is worked out from the facts of the tokens (`token_facts.py`) and the module's own window,
not from the host's mask; so every form of padding is read, and several texts in a row run as rows of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mismatch.mechanisms.parts.calling import cache_in, hidden_in
from mismatch.mechanisms.parts.projections import AttentionParts
from mismatch.mechanisms.parts.text_by_text import text_by_text
from mismatch.mechanisms.parts.token_facts import facts_in

QUERIES = 256
"""That are worked on at once where keys are chosen; a matter of speed and memory only."""


@dataclass(frozen=True)
class Seen:
    """The keys of one call, and which query may read which.

    Attributes:
        mask: bool `batch or 1, 1, queries, keys`; None = causal, queries == keys.
        numbers: int64 `batch or 1, keys`, which real token of its text each key is, -1 = a pad.
        own: int64 `batch or 1, queries`, the same of the tokens that ask.
    """

    mask: Tensor | None
    numbers: Tensor
    own: Tensor

    def rows(self, rows: slice) -> Tensor:
        """The mask of some queries, `batch or 1, 1, queries, keys`."""
        if self.mask is not None:
            return self.mask[:, :, rows]
        return (self.numbers[:, None] <= self.own[:, rows, None])[:, None]


class HostSoftmax(AttentionParts):
    """Softmax attention of the pieces of an attention, over the cache of the host."""

    @text_by_text
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """As the attention it replaces: `batch pos d_model` in, (`batch pos d_model`, None) out."""
        x, cache = hidden_in(args, kwargs), cache_in(kwargs)
        q, k, v = self.made(x, kwargs.get("position_embeddings"))
        seen = self._seen(args, kwargs)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        return self.project(self.read(q, k, v, seen), x), None

    def made(self, x: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `batch H pos any`, and what is cached as keys and as values, `batch any pos any` each."""
        q, k, v = self.qkv(x)
        q, k = self.rotate(q, k, position_embeddings)
        return q, k, v

    def read(self, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
        """The heads, `batch H pos D`, from queries and all that is cached."""
        return self.attend(q, k, v, seen.mask)

    def _seen(self, args: tuple, kwargs: dict[str, Any]) -> Seen:
        """Before anything is written to the cache."""
        x, cache = hidden_in(args, kwargs), cache_in(kwargs)
        length, past, offset = x.shape[1], 0, 0
        keys = length
        if cache is not None:
            past = cache.get_seq_length(self.layer_idx)
            keys, offset = cache.get_mask_sizes(length, self.layer_idx)
        number = facts_in(args, kwargs).numbers(keys, offset, x, cache)
        j = offset + torch.arange(keys, device=x.device)
        i = past + torch.arange(length, device=x.device)
        if number is None:
            if keys == length and (self.window is None or keys <= self.window):
                return Seen(None, j[None], i[None])
            own = i[None]
        else:
            own = number[:, i - offset]
        mask = j <= i[:, None]
        if self.window is not None:
            mask = mask & (i[:, None] - j < self.window)
        if number is not None:
            mask = mask & (number >= 0)[:, None] | (j == i[:, None])  # no query without a key
        return Seen(mask.view(-1, 1, length, keys), j[None] if number is None else number, own)


class ChosenKeys(HostSoftmax):
    """The same, of which each query of each head reads some keys only. Subclasses choose them by `chosen`.

    QUERIES at a time are worked on: memory grows with the length, not with its square, but for the masks that the
    backward pass keeps.
    """

    def read(self, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
        found = []
        for start in range(0, q.shape[2], QUERIES):
            rows = slice(start, start + QUERIES)
            with torch.no_grad():
                reads = self.chosen(q[:, :, rows], k, seen, rows)
            found.append(self.attend(q[:, :, rows], k, v, reads))
        return torch.cat(found, dim=2)

    def chosen(self, q: Tensor, k: Tensor, seen: Seen, rows: slice) -> Tensor:
        """Which keys these queries read: bool `batch H queries keys`.

        Args:
            q: `batch H queries D`, as they are compared with k.
            k: `batch KV keys D`.
            seen: of the whole call.
            rows: which of its queries these are.
        """
        raise NotImplementedError
