"""houlsby: a bottleneck adapter behind a sublayer, before its output is added to the stream.

    y = a + A(a),   a = original(x),   A(a) = W_up f(W_down a + b_down) + b_up

Source: Houlsby et al., arXiv 1902.00751 (section 2.1, figure 2): two per layer, after the
projection of the attention and after that of the MLP: `layer12.attn:houlsby; layer12.mlp:houlsby`.
The paper starts both matrices from a normal distribution of 0.01 cut at two of them, near the
identity (`init=houlsby`; the authors' code has 0.001); the default starts W_up at 0 and so at the
identity. The paper's bottleneck of 64 in a model of 1024 is reduction 16, its code's f is gelu. The
new norms that the paper trains beside the adapters are the model's own here, and inherited. In
gemma and olmo2 the family's norm of the sublayer's output comes behind the adapter. Inherited:
everything. New: W and b. Dropped: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import nn

from mismatch.mechanisms.base import Context, Wrapper
from mismatch.mechanisms.parts.bottleneck import Bottleneck
from mismatch.mechanisms.parts.calling import first_of, with_first


@dataclass(frozen=True)
class HoulsbyConfig:
    reduction: Annotated[float, "> 0"] = 16.0
    """Width of the model over width of the bottleneck."""
    nonlinearity: Literal["gelu", "relu", "swish", "tanh", "none"] = "gelu"
    """f."""
    init: Literal["zero", "houlsby"] = "zero"
    """How W_up starts: at 0, or as published."""


class Houlsby(Wrapper):
    """The module with a serial adapter behind it."""

    Config = HoulsbyConfig
    slots = ("attn", "mlp")
    identity = "at the start (init=zero)"
    state = "the original's"
    source = "arXiv 1902.00751, section 2.1"
    stacks = True

    def __init__(self, original: nn.Module, config: HoulsbyConfig, context: Context) -> None:
        super().__init__(original, config, context)
        self.adapter = Bottleneck(
            original,
            context,
            reduction=config.reduction,
            nonlinearity=config.nonlinearity,
            down="houlsby",
            up=config.init,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.original(*args, **kwargs)
        added = first_of(output)
        return with_first(output, added + self.adapter(added))
