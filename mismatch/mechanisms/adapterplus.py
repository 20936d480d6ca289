"""adapterplus: one bottleneck adapter behind a whole block, scaled channel by channel.

    y = h + c * A(h),   h = original(x),   A(h) = W_up f(W_down h + b_down) + b_up,   c in R^d, from 1

Source: Steitz and Roth, arXiv 2406.06820 ("Adapter+": post-adapter, learned channel-wise scale, no
norm, f = gelu, Houlsby's start). In a block h is the stream behind the MLP's addition, which is the
published place; in `attn` and `mlp` the same adapter stands where Houlsby et al. put theirs, behind the
sublayer and before the addition. `init=houlsby` is the published start (normal 0.01, cut at two of
them); the default starts W_up at 0 and so exactly at the teacher, from which the published start is
0.0002 nats away (SmolLM2-135M, layer 12, 512 tokens). Stochastic depth belongs to training and is
not here. Inherited: everything. New: W, b and c. Dropped: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import nn

from mismatch.mechanisms.base import Context, Wrapper, tensor_kind
from mismatch.mechanisms.parts.bottleneck import Bottleneck
from mismatch.mechanisms.parts.calling import first_of, with_first


@dataclass(frozen=True)
class AdapterPlusConfig:
    reduction: Annotated[float, "> 0"] = 96.0
    """Width of the model over width of the bottleneck (published: 8 of 768)."""
    nonlinearity: Literal["gelu", "relu", "swish", "tanh", "none"] = "gelu"
    """f."""
    init: Literal["zero", "houlsby"] = "zero"
    """How W_up starts: at 0, or as published."""


class AdapterPlus(Wrapper):
    """The module with a scaled serial adapter behind it."""

    Config = AdapterPlusConfig
    slots = ("block", "attn", "mlp")
    identity = "at the start (init=zero)"
    state = "the original's"
    source = "arXiv 2406.06820"
    stacks = True

    def __init__(self, original: nn.Module, config: AdapterPlusConfig, context: Context) -> None:
        super().__init__(original, config, context)
        self.adapter = Bottleneck(
            original,
            context,
            reduction=config.reduction,
            nonlinearity=config.nonlinearity,
            down="houlsby",
            up=config.init,
        )
        self.scale = nn.Parameter(torch.ones(context.d_model, **tensor_kind(original, context)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.original(*args, **kwargs)
        h = first_of(output)
        return with_first(output, h + self.adapter(h) * self.scale)
