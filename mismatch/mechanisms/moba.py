"""moba: every query reads its own block of keys and the blocks whose mean key it likes best.

    block m        tokens m B .. (m + 1) B - 1 of the text
    s_m = q . mean of its keys
    query i reads key j   iff   j <= i and (j is in the block of i
                                            or in one of the top - 1 earlier blocks of largest s_m)

Source: Mixture of Block Attention, Lu et al., arXiv 2502.13189, section 2.2: no parameters, the current block always
among the `top`, causal inside it. Queries and keys are compared as they are rotated; each head chooses for itself, and
heads of one kv head see the same means. Blocks are counted in real tokens, from the first one of each text of a row;
blocks that tie with the last one chosen are read too. The keys are all held and masked, so this measures what the
choice loses, not what it saves. It has no gradient; what is read has. Nothing seeks out the first token: behind its
block it is read only where that block is chosen.

Inherited: everything. New, dropped: nothing. Refused: layers with a window of their own, which drop old blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context
from mismatch.mechanisms.parts.host_softmax import ChosenKeys, Seen


@dataclass(frozen=True)
class MoBAConfig:
    block: Annotated[int, ">= 1"] = 64
    """Tokens of a block."""
    top: Annotated[int, ">= 1"] = 3
    """Blocks that a query reads, its own included."""


class MoBA(ChosenKeys):
    """Softmax over the keys of some blocks."""

    Config = MoBAConfig
    slots = ("attn",)
    heads = True
    identity = "block * top >= length"
    state = "the host's KV cache"
    source = "arXiv 2502.13189, section 2.2"

    def __init__(self, original: nn.Module, config: MoBAConfig, context: Context) -> None:
        """Raises:
        SurgeryError: a layer with a window of its own.
        """
        super().__init__(original, config, context)
        if self.window is not None:
            raise SurgeryError(
                f"{context.where}: `moba` chooses among all older blocks, and this module reads the last {self.window} "
                "tokens only",
                hint="take a layer of full attention",
            )

    def chosen(self, q: Tensor, k: Tensor, seen: Seen, rows: slice) -> Tensor:
        reads, earlier = seen.rows(rows), self.settings.top - 1
        size = self.settings.block
        # Pads are in block -1; their row of `own` is of no matter.
        of_key, own = (
            torch.div(n, size, rounding_mode="floor") for n in (seen.numbers, seen.own[:, rows])
        )
        near = (of_key[:, None] == own[..., None])[:, None]
        count = -(-k.shape[2] // size)
        if earlier == 0 or count == 1:
            return reads & near
        number = torch.arange(count, device=k.device)
        members = (of_key[:, None] == number[:, None]).float()[
            :, None
        ]  # `batch or 1, 1, blocks, keys`
        means = members @ k.float() / members.sum(-1, keepdim=True).clamp(min=1)
        scores = q.float() @ self.per_query_head(means).mT
        behind = (number < own[..., None])[:, None]
        scores = scores.masked_fill(~behind, torch.finfo(scores.dtype).min)
        if earlier < count:
            scores_of_last = scores.topk(earlier, dim=-1).values[..., -1:]
            behind = behind & (scores >= scores_of_last)
        far = behind.expand(*scores.shape).gather(
            -1, of_key.clamp(min=0)[:, None, None].expand(*scores.shape[:3], -1)
        )
        return reads & (near | far)
