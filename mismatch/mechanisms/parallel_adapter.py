"""parallel_adapter: a bottleneck adapter beside a sublayer, reading what the sublayer reads.

    y = original(x) + s A(x),   A(x) = W_up f(W_down x + b_down) + b_up

Source: He et al., arXiv 2110.04366 (table 1: "scaled parallel adapter"; their best is at the MLP).
In their summarisation runs s = 4, f = relu, and a bottleneck of 512 in a model of 1024, which is
reduction 2. Their models have the norms behind the sublayers, so that x is the stream; here x is
what the module is called with, behind the norm in front of it where there is one. W_down starts as in
LoRA and W_up at 0, which is the published start and the identity. Inherited: everything. New: W and
b; with `learned_scale` s. Dropped: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import nn

from mismatch.mechanisms.base import Context, Wrapper, tensor_kind
from mismatch.mechanisms.parts.bottleneck import Bottleneck
from mismatch.mechanisms.parts.calling import first_of, hidden_in, with_first


@dataclass(frozen=True)
class ParallelAdapterConfig:
    reduction: Annotated[float, "> 0"] = 2.0
    """Width of the model over width of the bottleneck."""
    nonlinearity: Literal["gelu", "relu", "swish", "tanh", "none"] = "relu"
    """f."""
    scale: float = 4.0
    """s."""
    learned_scale: bool = False
    """Train s, from `scale` on."""


class ParallelAdapter(Wrapper):
    """The module with an adapter beside it."""

    Config = ParallelAdapterConfig
    slots = ("mlp", "attn")
    identity = "at the start"
    state = "the original's"
    source = "arXiv 2110.04366, table 1"
    stacks = True

    def __init__(
        self, original: nn.Module, config: ParallelAdapterConfig, context: Context
    ) -> None:
        super().__init__(original, config, context)
        self.adapter = Bottleneck(
            original,
            context,
            reduction=config.reduction,
            nonlinearity=config.nonlinearity,
            down="lora",
            up="zero",
        )
        self.scale: float | nn.Parameter = config.scale
        if config.learned_scale:
            self.scale = nn.Parameter(torch.tensor(config.scale, **tensor_kind(original, context)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        added = self.adapter(hidden_in(args, kwargs)) * self.scale
        output = self.original(*args, **kwargs)
        return with_first(output, first_of(output) + added)
