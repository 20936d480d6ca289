"""topk: every query of every head reads the k keys of largest score, and no other. The oracle of sparse attention.

    query i reads key j   iff   j <= i and score_ij is among the k largest of its row

What every sparse attention approximates by an indexer, blocks or hashes (Gupta et al., arXiv 2106.06899, take the exact
top-k too): no choice of k keys per query keeps more of the attention weights. So what `topk` loses no indexer of the
same budget can save, and what it keeps, an indexer may still lose. The scores are those of the attention, with
position, scaling and softcap; the first token is a key like any other. Keys that tie with the k-th are read too. All
scores are computed and all keys are held, so this measures what sparsity loses, not what it saves. The choice has no
gradient; the scores that are read have theirs. A module's own window bounds what is chosen from.

Inherited: everything. New, dropped: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from mismatch.mechanisms.parts.host_softmax import ChosenKeys, Seen


@dataclass(frozen=True)
class TopKConfig:
    k: Annotated[int, ">= 1"] = 64
    """Keys that a query reads."""


class TopK(ChosenKeys):
    """Softmax over the keys of largest score."""

    Config = TopKConfig
    slots = ("attn",)
    heads = True
    identity = "k >= length"
    state = "the host's KV cache"
    source = "arXiv 2106.06899 (exact top-k)"

    def chosen(self, q: Tensor, k: Tensor, seen: Seen, rows: slice) -> Tensor:
        reads = seen.rows(rows)
        if k.shape[2] <= self.settings.k:
            return reads
        scores = q.float() @ self.per_query_head(k).float().mT * self.scaling
        # A softcap keeps the order. What is not read comes last.
        scores = scores.masked_fill(~reads, torch.finfo(scores.dtype).min)
        least = scores.topk(self.settings.k, dim=-1).values[..., -1:]
        return reads & (scores >= least)
