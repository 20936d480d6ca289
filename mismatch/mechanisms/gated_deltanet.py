"""gated_deltanet: a matrix per head that forgets a little, then overwrites what a key pointed at.

Source: arXiv 2412.06464 (Yang, Kautz, Hatamizadeh), eq. 10 and section 3.3; the mixer is transformers'
`Qwen3NextGatedDeltaNet`. Per head, q, k and v after a causal convolution over the last `conv` tokens and a SiLU, q and
k of length 1:

    S_t = S_{t-1} (a_t (I - b_t k_t k_t^T)) + b_t v_t k_t^T     b_t = sigmoid(.), a_t = exp(-A softplus(. + dt_bias))
    o_t = S_t q_t / sqrt(head_dim)
    out = W_o (RMSNorm(o_t) * w * silu(z_t))                    z the gate, one norm per head

Whole texts are computed in chunks of 64 tokens, exactly. init=inherit takes q, k, v and the output projection from the
attention, keys and values repeated over their group. Position embedding is dropped; decay and convolution tell order.
The convolution starts as "this token alone". Measured by hand, KL in nats before -> after fitting the layer's output
(toy: 150 steps, two seeds; SmolLM2-135M: 100 steps of 512 tokens, one seed):

                                         toy layer 1     toy layer 2     SmolLM2 layer 12
    zero                                 .456            .333            .055
    inherit                              .432 -> .054    .326 -> .043    .072 -> .024
    inherit, random convolution          .467 -> .083
    fresh, five times the new parameters .460 -> .103    .336 -> .063    .056 -> .047

dt_bias is drawn as the paper's code (flash-linear-attention) draws it, softplus(dt_bias) log-uniform in 0.001 .. 0.1.
transformers sets it to 1: with A uniform in 0 .. 16 the median head then keeps exp(-10) of its state after one token.

    inherit   Inherited: the projections and query/key norms. New: gate, a and b, convolution, A, dt_bias, norm.
              Dropped: position embedding, softmax, the module's scaling, softcap and window
    fresh     new projections, heads as the attention's query heads. Inherited: nothing. New: everything.
              Dropped: everything

At 1024 tokens on one CPU core 1.4 times the attention it replaces, 1.6 with backward. State in generate() on SmolLM2:
9 x 64 x 64 float32 and 4 x 1728 numbers of the model's dtype a row: 175,104 bytes in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from mismatch.mechanisms.base import Context
from mismatch.mechanisms.parts.initial_values import (
    SMALL,
    WRITE,
    Statistics,
    keys,
    silu_gate,
    softplus_inverse,
)
from mismatch.mechanisms.parts.linears import Columns, stand_in
from mismatch.mechanisms.parts.mixers import Mixer, identity_taps, on_any_device

Library = on_any_device(Qwen3NextGatedDeltaNet, __name__)
STEP_MIN, STEP_MAX, STEP_FLOOR = 0.001, 0.1, 1e-4  # softplus(dt_bias) of flash-linear-attention


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    init: Literal["inherit", "fresh"] = "inherit"
    """Around the attention's own projections, or a new layer."""
    conv: Annotated[int, "2..4"] = 4
    """Tokens that the convolution sees."""


class GatedDeltaNet(Mixer):
    """Gated DeltaNet around the attention's projections, or fresh."""

    Config = GatedDeltaNetConfig
    slots = ("attn",)
    heads = ("init", "inherit")
    identity = "none: softmax attention is no delta rule"
    state = (
        "per row and head one matrix (head_dim x head_dim) in float32, and the last `conv` columns "
        "of q, k and v; whatever the length"
    )
    source = "arXiv 2412.06464; transformers' Qwen3NextGatedDeltaNet"
    mixer: Any
    gate: Any
    write: Any

    def __init__(self, original: nn.Module, config: GatedDeltaNetConfig, context: Context) -> None:
        super().__init__(original, config, context)
        self.mixer = self.drawn("mixer", self._mixer)
        if self.inherits:
            d_model, heads = context.d_model, self.n_heads
            self.gate = self.drawn("gate", lambda: nn.Linear(d_model, self.width, bias=False))
            self.write = self.drawn("write", lambda: nn.Linear(d_model, 2 * heads, bias=False))

    def _mixer(self) -> nn.Module:
        heads, head_dim = self.n_heads, self.head_dim
        mixer: Any = Library(
            Qwen3NextConfig(
                hidden_size=self.context.d_model,
                linear_num_key_heads=heads,
                linear_num_value_heads=heads,
                linear_key_head_dim=head_dim,
                linear_value_head_dim=head_dim,
                linear_conv_kernel_dim=self.settings.conv,
                num_hidden_layers=1,
                layer_types=["linear_attention"],
            ),
            layer_idx=0,
        )
        with torch.no_grad():
            low, high = math.log(STEP_MIN), math.log(STEP_MAX)
            step = torch.empty_like(mixer.dt_bias).uniform_(low, high).exp().clamp(min=STEP_FLOOR)
            mixer.dt_bias.copy_(softplus_inverse(step))
        if self.inherits:
            split = 4 * self.width
            stand_in(mixer, "in_proj_qkvz", Columns(0, split))
            stand_in(mixer, "in_proj_ba", Columns(split, split + 2 * heads))
            stand_in(mixer, "out_proj", Columns())
            identity_taps(mixer.conv1d)
        return mixer

    def columns(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Per head q, k, v, gate; then per head b, a: `batch pos 4*H*D + 2*H`."""
        if not self.inherits:
            return x
        gate = self.gate(x) if gate is None else gate
        q, k, v = (self.flat(part) for part in self.qkv(x))
        parts = [part.unflatten(-1, (self.n_heads, -1)) for part in (q, k, v, gate)]
        return torch.cat([torch.cat(parts, dim=-1).flatten(-2), self.write(x)], dim=-1)

    # ---- initial values from the attention's statistics ------------------------------------------

    def initial_values(self) -> dict[str, Callable[[Statistics], None]]:
        if not self.inherits:
            return {}
        return {
            **keys(self),
            "values": self._straighten_values,
            "half-life": self._forget,
            "write": self._write_less,
            "gate": self._fit_gate,
        }

    def _straighten_values(self, _statistics: Statistics) -> None:
        self.mixer.conv1d.weight[2 * self.width :, ..., -1] = SMALL

    def _forget(self, statistics: Statistics) -> None:
        self.write.weight[1::2] = 0
        self.mixer.A_log.zero_()
        step = math.log(2) / statistics.half_life(self.n_heads)
        self.mixer.dt_bias.copy_(softplus_inverse(step))

    def _write_less(self, statistics: Statistics) -> None:
        self.write.weight[::2] = (WRITE * statistics.constant).to(self.write.weight)

    def _fit_gate(self, statistics: Statistics) -> None:
        gate, scale = silu_gate(statistics, self.without_gate)
        self.gate.weight.copy_(gate.repeat_interleave(self.head_dim, dim=0))
        self.mixer.norm.weight.div_(scale)
