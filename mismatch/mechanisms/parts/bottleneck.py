"""What the bottleneck adapters share: a narrow MLP of one hidden layer, and how it starts.

    A(x) = W_up f(W_down x + b_down) + b_up,    W_down: d/reduction x d,   W_up: d x d/reduction

| init | W_down | W_up | source |
|---|---|---|---|
| `zero` | as published | 0: the student starts as the teacher | |
| `houlsby` | normal 0.01, cut at two of them | the same | arXiv 1902.00751 |
| `lora` | uniform in +-1/sqrt(d) | 0 | arXiv 2110.04366, its code's `init_option="lora"` |

Both biases start at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mismatch.mechanisms.base import Context, tensor_kind
from mismatch.mechanisms.parts.linears import generator


def _unchanged(x: Tensor) -> Tensor:
    return x


NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "none": _unchanged,
}
HOULSBY_STD = 0.01  # arXiv 1902.00751


class Bottleneck(nn.Module):
    """The adapter's MLP, without residual and scale.

    Args:
        original: the module that is adapted, for dtype and device.
        context: for the width and the seed.
        reduction: d over the width of the bottleneck, which is at least 1.
        nonlinearity: a name of `NONLINEARITIES`.
        down, up: how each matrix starts: `houlsby`, `lora` (down only) or `zero`.
    """

    def __init__(
        self,
        original: nn.Module,
        context: Context,
        *,
        reduction: float,
        nonlinearity: str,
        down: str,
        up: str,
    ) -> None:
        super().__init__()
        d = context.d_model
        width = max(1, int(d / reduction))
        self.nonlinearity = NONLINEARITIES[nonlinearity]
        self.down = _linear(d, width, down, original, context, "down")
        self.up = _linear(width, d, up, original, context, "up")

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.nonlinearity(self.down(x)))


def _linear(
    inputs: int, outputs: int, init: str, original: nn.Module, context: Context, name: str
) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, device="meta")
    weight = torch.zeros(outputs, inputs, device="cpu")
    draws = generator(context, name)
    if init == "houlsby":
        limit = 2 * HOULSBY_STD
        nn.init.trunc_normal_(weight, std=HOULSBY_STD, a=-limit, b=limit, generator=draws)
    elif init == "lora":
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=draws)
    kind = tensor_kind(original, context)
    layer.weight = nn.Parameter(weight.to(**kind))
    layer.bias = nn.Parameter(torch.zeros(outputs, **kind))
    return layer
