"""nope: attention without position encoding (the rotary embedding becomes the identity rotation).

    cos := 1, sin := 0        so that rotate(q, k) = q, k

Source: Kazemnejad et al., arXiv 2305.19466 (NoPE). Only what the rotary embedding carried is lost;
the causal mask still separates early from late. The attention factor of YaRN and longrope rides on cos
and sin and is no position, so it is kept: cos := factor. One layer or all of them; the other layers
keep theirs. Refused where there is nothing to remove: gpt2 (learned positions, added once to the
embeddings) and layers that have no rotary embedding (smollm3). Inherited: everything. New, dropped:
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mismatch.mechanisms.base import Context, Wrapper
from mismatch.mechanisms.parts.rotary import attention_factor, need_rotary


@dataclass(frozen=True)
class NoPEConfig:
    """No options."""


class NoPE(Wrapper):
    """Passes the identity rotation to the wrapped attention."""

    Config = NoPEConfig
    slots = ("rope",)
    heads = True
    identity = "none: only a text of one token has no positions"
    state = "the host's KV cache, keys without rotation"
    source = "arXiv 2305.19466"
    stacks = True

    def __init__(self, original: nn.Module, config: NoPEConfig, context: Context) -> None:
        """Raises:
        SurgeryError: this attention has no rotary embedding.
        """
        super().__init__(original, config, context)
        need_rotary(original, context, "remove")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cos, sin = kwargs["position_embeddings"]
        kwargs = {**kwargs, "position_embeddings": identity_rotation(cos, sin)}
        return self.original(*args, **kwargs)


def identity_rotation(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of no rotation, in their shapes; the attention factor (the length of (cos, sin))
    stays."""
    factor = attention_factor(cos, sin)
    return torch.ones_like(cos) * factor, torch.zeros_like(sin)
