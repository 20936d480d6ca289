"""short_conv: a gated convolution over a few tokens, and nothing further back.

Source: arXiv 2511.23404 (LFM2); the mixer is transformers' `Lfm2ShortConv`:

    B, C, x = W_in u               three vectors of d_model
    y_t = C_t * sum_{j < conv} w_j * (B * x)_{t-j}        element-wise, one filter per channel
    out = W_o y

It sees `conv` tokens: all that the layer took from further back is lost. Taking x from W_v and out from W_o gains next
to nothing: on the trained toy (150 steps on layer 1's output, two seeds, by hand) the KL of .456 that `zero` costs
became .173 fresh, .170 with both inherited. So the layer is always new.

Inherited: nothing. New: both projections and the filters. Dropped: the attention with all its projections and norms.
At 1024 tokens on one CPU core 0.7 times the attention it replaces, 0.6 with backward. State in generate() on SmolLM2:
3 x 576 numbers of the model's dtype a row: 6,912 bytes in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import nn
from transformers import Lfm2Config
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

from mismatch.mechanisms.base import Context
from mismatch.mechanisms.parts.mixers import Mixer, on_any_device

Library = on_any_device(Lfm2ShortConv, __name__)


@dataclass(frozen=True)
class ShortConvConfig:
    conv: Annotated[int, "2..4"] = 3
    """Tokens that the convolution sees."""


class ShortConv(Mixer):
    """LFM2's short convolution, fresh."""

    Config = ShortConvConfig
    slots = ("attn",)
    identity = "none: it sees a few tokens"
    state = "per row the last `conv` gated columns (d_model each); whatever the length"
    source = "arXiv 2511.23404 (LFM2); transformers' Lfm2ShortConv"
    cache_name = "past_key_values"

    def __init__(self, original: nn.Module, config: ShortConvConfig, context: Context) -> None:
        super().__init__(original, config, context)
        self.mixer = self.drawn("mixer", self._mixer)

    def _mixer(self) -> nn.Module:
        config = Lfm2Config(
            hidden_size=self.context.d_model,
            conv_L_cache=self.settings.conv,
            num_hidden_layers=1,
            layer_types=["conv"],
        )
        return Library(config, layer_idx=0)
