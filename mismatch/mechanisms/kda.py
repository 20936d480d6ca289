"""kda: Kimi Delta Attention. A gated delta rule that forgets by channel of the key, not by head.

Source: Kimi Linear, arXiv 2510.26692, section 3; the mixer is transformers' `KimiLinearDeltaAttention`. Per head, q, k
and v after a causal convolution over the last `conv` tokens and a SiLU, q and k of length 1:

    S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T      b_t = sigmoid(.), one a head
    o_t = S_t^T q_t / sqrt(head_dim)                                 a_t = exp(-A softplus(W_f W_f' x + dt_bias))
    out = W_o (RMSNorm(o_t) * w * sigmoid(z_t))                      z = W_z W_z' x, the gate; one norm per head

Decay and gate are made through head_dim numbers. Whole texts are computed in chunks of tokens, exactly. init=inherit
takes q, k, v and the output projection from the attention, keys and values repeated over their group. Position
embedding is dropped; decay and convolution tell order. The convolution starts as "this token alone"; A (1 .. 16) and
dt_bias (softplus(dt_bias) log-uniform in 0.001 .. 0.1) are drawn as the library draws them.

    inherit   Inherited: the projections and query/key norms. New: gate, decay and b, convolution, A, dt_bias, norm.
              Dropped: position embedding, softmax, the module's scaling, softcap and window
    fresh     new projections, heads as the attention's query heads. Inherited: nothing. New: everything.
              Dropped: everything

On a CPU the library has no fast path: each pair of tokens of a chunk costs head_dim numbers, for every channel decays
by itself; so chunks are short there. State in generate() on SmolLM2: 9 x 64 x 64 float32 and 4 x 1728 numbers of the
model's dtype a row: 175,104 bytes in float32.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearDeltaAttention,
    chunk_kimi_delta_attention,
)

from mismatch.mechanisms.base import Context
from mismatch.mechanisms.parts.calling import hidden_in
from mismatch.mechanisms.parts.initial_values import (
    SMALL,
    WRITE,
    Statistics,
    keys,
    sigmoid_gate,
    softplus_inverse,
)
from mismatch.mechanisms.parts.linears import Columns, stand_in
from mismatch.mechanisms.parts.mixers import Mixer, identity_taps, on_any_device

CHUNK = 16  # tokens computed at once on a CPU: each pair of them costs head_dim numbers; the library's own are 64
Library = on_any_device(
    KimiLinearDeltaAttention,
    __name__,
    chunk_kimi_delta_attention=functools.partial(
        inspect.unwrap(chunk_kimi_delta_attention), chunk_size=CHUNK
    ),
)
RATE_MIN, RATE_MAX = 1.0, 16.0  # A, of the library's own start
STEP_MIN, STEP_MAX = 0.001, 0.1  # softplus(dt_bias)


@dataclass(frozen=True)
class KDAConfig:
    init: Literal["inherit", "fresh"] = "inherit"
    """Around the attention's own projections, or a new layer."""
    conv: Annotated[int, "2..4"] = 4
    """Tokens that the convolution sees."""


class KDA(Mixer):
    """Kimi Delta Attention around the attention's projections, or fresh."""

    Config = KDAConfig
    slots = ("attn",)
    heads = ("init", "inherit")
    identity = "none: softmax attention is no delta rule"
    state = (
        "per row and head one matrix (head_dim x head_dim) in float32, and the last `conv` columns of q, k and v; "
        "whatever the length"
    )
    source = "arXiv 2510.26692; transformers' KimiLinearDeltaAttention"
    mixer: Any
    decay: Any
    write: Any
    gate: Any

    def __init__(self, original: nn.Module, config: KDAConfig, context: Context) -> None:
        super().__init__(original, config, context)
        self.mixer = self.drawn("mixer", self._mixer)
        if self.inherits:
            for name, width in self._sizes().items():
                setattr(self, name, self.drawn(name, self._linear(width)))

    def _sizes(self) -> dict[str, int]:
        """Of what is made of the stream in place of the mixer's own first projections, in the order of the columns."""
        return {"decay": self.head_dim, "write": self.n_heads, "gate": self.head_dim}

    def _linear(self, width: int) -> Callable[[], nn.Module]:
        return lambda: nn.Linear(self.context.d_model, width, bias=False)

    def _mixer(self) -> nn.Module:
        mixer: Any = Library(
            KimiLinearConfig(
                hidden_size=self.context.d_model,
                linear_num_heads=self.n_heads,
                linear_head_dim=self.head_dim,
                linear_conv_kernel_dim=self.settings.conv,
                num_hidden_layers=1,
                layer_types=["linear_attention"],
            ),
            layer_idx=0,
        )
        forget = mixer.forget_gate
        with torch.no_grad():  # outside a model of the library's, they are whatever the memory held
            forget.A_log.uniform_(RATE_MIN, RATE_MAX).log_()
            step = torch.empty_like(forget.dt_bias).uniform_(math.log(STEP_MIN), math.log(STEP_MAX))
            forget.dt_bias.copy_(softplus_inverse(step.exp()))
        if self.inherits:
            places = [(mixer, "q_proj"), (mixer, "k_proj"), (mixer, "v_proj")]
            places += [(forget, "f_a_proj"), (mixer, "b_proj"), (mixer, "g_a_proj")]
            widths = [self.width] * 3 + list(self._sizes().values())
            ends = [sum(widths[: at + 1]) for at in range(len(widths))]
            stand_in(mixer, "o_proj", Columns())
            for (holder, name), end, width in zip(places, ends, widths, strict=True):
                stand_in(holder, name, Columns(end - width, end))
            identity_taps(mixer.conv1d)
        return mixer

    def columns(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """q, k, v, then what makes decay, b and gate: `batch pos 3*H*D + 2*D + H`."""
        if not self.inherits:
            return x
        gate = self.gate(x) if gate is None else gate
        parts = (*(self.flat(part) for part in self.qkv(x)), self.decay(x), self.write(x), gate)
        return torch.cat(parts, dim=-1)

    # ---- initial values from the attention's statistics ------------------------------------------

    def initial_values(self) -> dict[str, Callable[[Statistics], None]]:
        if not self.inherits:
            return {}
        return {
            **keys(self),
            "values": self._straighten_values,
            "half-life": self._forget,
            "write": self._write_less,
            **({"gate": self._fit_gate} if self.n_heads <= self.head_dim else {}),
        }

    def _straighten_values(self, _statistics: Statistics) -> None:
        self.mixer.conv1d.weight[2 * self.width :, ..., -1] = SMALL

    def _forget(self, statistics: Statistics) -> None:
        forget = self.mixer.forget_gate
        self.decay.weight.zero_()
        forget.A_log.zero_()
        step = math.log(2) / statistics.half_life(self.n_heads)
        forget.dt_bias.copy_(softplus_inverse(step).repeat_interleave(self.head_dim))

    def _write_less(self, statistics: Statistics) -> None:
        self.write.weight[:] = (WRITE * statistics.constant).to(self.write.weight)

    def _fit_gate(self, statistics: Statistics) -> None:
        """One of the numbers behind the gate for each head; the others begin at 0."""
        gate, scale = sigmoid_gate(statistics, self.without_gate, alike=True)
        self.gate.weight.zero_()
        self.gate.weight[: self.n_heads] = gate.to(self.gate.weight)
        own = torch.eye(self.n_heads).repeat_interleave(self.head_dim, dim=0)
        self.mixer.g_b_proj.weight[:, : self.n_heads] = own.to(self.gate.weight)
        self.mixer.o_norm.weight.mul_(scale[0])

    def without_gate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Twice the heads with every gate at 1/2, `batch H pos D`."""
        x = hidden_in(args, kwargs)
        half = x.new_zeros(*x.shape[:2], self.head_dim)
        y, _ = self.run(self.columns(x, half), {})
        return 2 * y.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)
