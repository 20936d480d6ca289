"""partial_rope: only the fastest rotary frequencies rotate; the slow pairs stand still.

    n = floor(fraction x pairs)
    pair i <  n   rotated as before
    pair i >= n   cos := 1, sin := 0

Source: p-RoPE, arXiv 2410.06205 (Barbero et al., "Round and Round We Go!"), where models are
trained without the slow pairs; here they are taken from a model that had them. Between `nope`
(fraction=0) and the teacher (fraction=1). Pairs are those that the model was trained with (dims i
and i + D/2 of the rotated part); the partial rotary of GPT-NeoX, which pairs other dims, is another
thing. The host's angles are used as they come, with a scaling of its own, and so is the attention
factor of YaRN and longrope, which is no position: cos := factor. Inherited: everything. New:
nothing. Dropped: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from mismatch.mechanisms.base import Context, Wrapper
from mismatch.mechanisms.parts.rotary import attention_factor, need_rotary


@dataclass(frozen=True)
class PartialRopeConfig:
    fraction: Annotated[float, "0..1"]
    """Share of the pairs that still rotates, the fastest first."""


class PartialRope(Wrapper):
    """Passes cos and sin whose slow pairs stand still to the wrapped attention."""

    Config = PartialRopeConfig
    slots = ("rope",)
    heads = True
    identity = "fraction = 1"
    state = "the host's KV cache, keys with part of their rotation"
    source = "arXiv 2410.06205 (p-RoPE)"
    stacks = True

    def __init__(self, original: nn.Module, config: PartialRopeConfig, context: Context) -> None:
        """Raises:
        SurgeryError: this attention has no rotary embedding.
        """
        super().__init__(original, config, context)
        need_rotary(original, context, "cut")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cos, sin = kwargs["position_embeddings"]
        new = still(cos, sin, self.settings.fraction)
        return self.original(*args, **{**kwargs, "position_embeddings": new})


def still(cos: Tensor, sin: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """cos and sin `batch pos width` with all but the first `fraction` of their pairs at angle 0."""
    pairs = cos.shape[-1] // 2
    kept = torch.arange(cos.shape[-1], device=cos.device) % pairs < int(fraction * pairs)
    factor = attention_factor(cos, sin)
    return torch.where(kept, cos, factor), torch.where(kept, sin, torch.zeros_like(factor))
