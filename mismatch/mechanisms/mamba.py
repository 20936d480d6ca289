"""mamba: the first Mamba, a state space with one decay per channel and state. Slow on a CPU; take mamba2 there.

Source: arXiv 2312.00752 (Gu, Dao), section 3.2 and algorithm 2; the mixer is transformers' `MambaMixer`. With x after a
causal convolution over the last `conv` tokens and a SiLU, and dt, B, C made from that x, per channel:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t      state, d_inner x state; A < 0 per channel and state
    y_t = h_t C_t + D x_t
    out = W_o (y_t * silu(z_t))

There is no q or k to inherit: B and C are shared by all channels. Taking x from W_v and out from W_o gains next to
nothing: on the trained toy (150 steps on layer 1's output, two seeds, by hand) the KL of .456 that `zero` costs became
.102 with both, .105 fresh at the same width, .088 fresh at twice the width. So the layer is always new.

Two things are not the library's. Its scan on a CPU reads slices out of one tensor, and the gradient of each is as large
as the whole: forward and backward of 512 tokens take 25 s at SmolLM2's width. Here the steps are unbound once: 0.5 s.
And it starts from an empty state whenever more than one token goes on from a cache; here those tokens go one by one.

Inherited: nothing. New: everything. Dropped: the attention with all its projections and norms.
At 1024 tokens on one CPU core 6 times the attention it replaces, with backward too. State in generate() on SmolLM2:
1152 x 16 float32 and 4 x 1152 numbers of the model's dtype a row: 92,160 bytes in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaConfig as LibraryConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from mismatch.mechanisms.base import Context
from mismatch.mechanisms.parts.mixers import Mixer, on_any_device


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The library's `mamba_selective_scan`, token by token, in time linear in the length.

    Args:
        x, dt, z: `batch d_inner pos`; softplus of dt + delta_bias is the step.
        A: `d_inner state`, < 0.
        B, C: `batch state pos`.
        D, delta_bias: `d_inner`.

    Returns:
        y `batch d_inner pos` and the last state `batch d_inner state`, both float32 at least.
    """
    step = F.softplus(dt + delta_bias.to(dt.dtype)[:, None]).float().transpose(1, 2)[..., None]
    decay = torch.exp(step * A)
    write = step * x.float().transpose(1, 2)[..., None] * B.float().transpose(1, 2)[:, :, None]
    h, states = torch.zeros_like(write[:, 0]), []
    for keep, add in zip(decay.unbind(1), write.unbind(1), strict=True):
        h = keep * h + add
        states.append(h)
    read = torch.stack(states, dim=1) @ C.float().transpose(1, 2)[..., None]
    return (read[..., 0].transpose(1, 2) + x * D[:, None]) * F.silu(z), h


Library = on_any_device(MambaMixer, __name__, mamba_selective_scan=scan)


@dataclass(frozen=True)
class MambaConfig:
    state: Annotated[int, ">= 1"] = 16
    """Numbers of state per channel."""
    expand: Annotated[int, ">= 1"] = 2
    """Inner width over d_model."""
    conv: Annotated[int, "2..4"] = 4
    """Tokens that the convolution sees."""


class Mamba(Mixer):
    """Mamba-1, fresh."""

    Config = MambaConfig
    slots = ("attn",)
    identity = "none: softmax attention is no state space"
    state = (
        "per row one matrix (expand * d_model x state) in float32, and the last `conv` columns of x; "
        "whatever the length"
    )
    source = "arXiv 2312.00752; transformers' MambaMixer"

    def __init__(self, original: nn.Module, config: MambaConfig, context: Context) -> None:
        super().__init__(original, config, context)
        self.mixer = self.drawn("mixer", self._mixer)

    def _mixer(self) -> nn.Module:
        config = LibraryConfig(
            hidden_size=self.context.d_model,
            expand=self.settings.expand,
            state_size=self.settings.state,
            conv_kernel=self.settings.conv,
            num_hidden_layers=1,
        )
        return Library(config, layer_idx=0)

    def run(self, columns: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Mixer.run`; from a state, token by token: the library's scan begins with an empty one."""
        if not rows:
            return super().run(columns, rows)
        out = []
        for token in columns.split(1, dim=1):
            y, rows = super().run(token, rows)
            out.append(y)
        return torch.cat(out, dim=1), rows
