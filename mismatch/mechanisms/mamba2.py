"""mamba2: a state space in place of attention; its state is one matrix per head, decayed by one number per token.

Source: arXiv 2405.21060 (Dao, Gu), sections 5 to 7; the mixer is transformers' `Mamba2Mixer`. Per head, x, B and C
after a causal convolution over the last `conv` tokens and a SiLU:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T      state, head_dim x state; A < 0 and dt_t > 0 one number each
    y_t = h_t C_t + D x_t
    out = W_o (RMSNorm(y_t * silu(z_t)) * w)        z the gate; one norm per group of B and C
    out = W_o (RMSNorm(y_t) * w * silu(z_t))        norm=before: the authors' `norm_before_gate`, as in Falcon-H1

init=inherit maps attention onto it as MambaInLlama does (arXiv 2408.15237, section 2.2): C from W_q, B from W_k, x from
W_v, out by W_o, every query head with its own B, C and norm, keys and values repeated over their group. But for decay,
SiLU, gate and norm this is attention without softmax. Position embedding is dropped; decay and convolution tell order.
Two things start otherwise than there: the convolution as "this token alone", and w at 0.1, because the norm makes each
head as long as the output projection never saw it. Measured by hand, KL in nats before -> after fitting the layer's
output (toy: 150 steps, two seeds; SmolLM2-135M: 100 steps of 512 tokens, one seed):

                                         toy layer 1     toy layer 2     SmolLM2 layer 12
    zero                                 .456            .333            .055
    inherit                              .451 -> .081    .329 -> .058    .067 -> .034
    inherit, w at 1                      .544 -> .085    .406 -> .063    1.50 -> .118
    inherit, w at 1, random convolution  .597 -> .116
    fresh, six times the new parameters  .508 -> .097    .367 -> .052    .093 -> .042

    inherit   Inherited: the projections and query/key norms. New: gate, dt, convolution, A, D, norm.
              Dropped: position embedding, softmax, the module's scaling, softcap and window
    fresh     the layer as the library makes it, `heads` heads of expand * d_model / heads, one B and C of width
              `state` for all. Inherited: nothing. New: everything. Dropped: everything

At 1024 tokens on one CPU core 1.2 times the attention it replaces, 1.1 with backward (fresh: 2.4 and 1.9). State in
generate() on SmolLM2: 9 x 64 x 64 float32 and 4 x 1728 numbers of the model's dtype a row: 175,104 bytes in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mamba2Config as LibraryConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, MambaRMSNormGated

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context
from mismatch.mechanisms.parts.initial_values import (
    SMALL,
    Statistics,
    keys,
    silu_gate,
    softplus_inverse,
)
from mismatch.mechanisms.parts.linears import Columns, stand_in
from mismatch.mechanisms.parts.mixers import Mixer, identity_taps, on_any_device

Library = on_any_device(Mamba2Mixer, __name__)


class NormBefore(MambaRMSNormGated):
    """RMSNorm(y) * w * silu(z)."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        normed = super().forward(hidden_states)
        return normed if gate is None else normed * F.silu(gate.float()).to(normed.dtype)


CHUNK = 64  # tokens computed at once; more only takes more memory on a CPU
EXPAND, STATE = 2, 64  # of a fresh layer: the library's expansion, a state for small models
GAIN = 0.1  # of the norm before the inherited output projection, at the start


@dataclass(frozen=True)
class Mamba2Config:
    init: Literal["inherit", "fresh"] = "inherit"
    """Around the attention's own projections, or a new layer."""
    conv: Annotated[int, "2..4"] = 4
    """Tokens that the convolution sees."""
    norm: Literal["after", "before"] = "after"
    """Whether the norm stands behind the gate, as published, or before it; the gate then says how loud a head is."""
    state: Annotated[int, ">= 1"] | None = None
    """Width of B and C; fresh: 64. An inherited one has the attention's head_dim."""
    expand: Annotated[int, ">= 1"] | None = None
    """Inner width over d_model; fresh: 2. An inherited one has the attention's heads."""
    heads: Annotated[int, ">= 1"] | None = None
    """Heads of a fresh layer; none: as many of the attention's head_dim as fit."""


class Mamba2(Mixer):
    """Mamba-2 around the attention's projections, or fresh."""

    Config = Mamba2Config
    slots = ("attn",)
    heads = ("init", "inherit")
    identity = "none: softmax attention is no state space"
    state = (
        "per row and head one matrix (head_dim x state) in float32, and the last `conv` columns of "
        "x, B and C; whatever the length"
    )
    mixer: Any
    gate: Any
    step: Any
    source = "arXiv 2405.21060; inherited as in arXiv 2408.15237; transformers' Mamba2Mixer"

    def __init__(self, original: nn.Module, config: Mamba2Config, context: Context) -> None:
        """Raises:
        SurgeryError: sizes that an inherited layer takes from the attention, or that do not divide.
        """
        super().__init__(original, config, context)
        self.mixer = self.drawn("mixer", self._mixer)
        if self.inherits:
            d_model, heads = context.d_model, self.n_heads
            self.gate = self.drawn("gate", lambda: nn.Linear(d_model, self.width, bias=False))
            self.step = self.drawn("step", lambda: nn.Linear(d_model, heads, bias=False))

    def _mixer(self) -> nn.Module:
        mixer: Any = Library(
            LibraryConfig(
                **self._sizes(),
                conv_kernel=self.settings.conv,
                chunk_size=CHUNK,
                num_hidden_layers=1,
            ),
            layer_idx=0,
        )
        if self.inherits:
            for name in ("in_proj", "out_proj"):
                stand_in(mixer, name, Columns())
            identity_taps(mixer.conv1d)
            nn.init.constant_(mixer.norm.weight, GAIN)
        if self.settings.norm == "before":
            norm = mixer.norm
            mixer.norm = NormBefore(len(norm.weight), norm.group_size, norm.variance_epsilon)
            mixer.norm.weight = norm.weight
        return mixer

    def _sizes(self) -> dict[str, Any]:
        config, where = self.settings, self.context.where
        if self.inherits:
            given = {name: getattr(config, name) for name in ("state", "expand", "heads")}
            given = {name: value for name, value in given.items() if value is not None}
            if given:
                raise SurgeryError(
                    f"{where}: an inherited mamba2 has the sizes of the attention "
                    f"({self.n_heads} heads, state {self.head_dim}); got "
                    + ", ".join(f"{name}={value}" for name, value in given.items()),
                    hint="leave them out, or init=fresh",
                )
            return {
                "hidden_size": self.width,
                "expand": 1,
                "num_heads": self.n_heads,
                "head_dim": self.head_dim,
                "n_groups": self.n_heads,
                "state_size": self.head_dim,
            }
        expand = config.expand or EXPAND
        inner = expand * self.width
        heads = config.heads or max(1, inner // self.head_dim)
        if inner % heads:
            raise SurgeryError(
                f"{where}: the inner width of mamba2, expand * d_model = {expand} * {self.width} = "
                f"{inner}, does not divide into {heads} heads",
                hint=f"pass heads=N, N a divisor of {inner}",
            )
        return {
            "hidden_size": self.width,
            "expand": expand,
            "num_heads": heads,
            "head_dim": inner // heads,
            "n_groups": 1,
            "state_size": config.state or STATE,
        }

    def columns(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """gate, x, B, C, dt: `batch pos 4*H*D + H`."""
        if not self.inherits:
            return x
        q, k, v = self.qkv(x)
        gate = self.gate(x) if gate is None else gate
        return torch.cat([gate, self.flat(v), self.flat(k), self.flat(q), self.step(x)], dim=-1)

    # ---- initial values from the attention's statistics ------------------------------------------

    def initial_values(self) -> dict[str, Callable[[Statistics], None]]:
        if not self.inherits:
            return {}
        return {
            **keys(self),
            "values": self._straighten_values,
            "half-life": self._forget,
            **({"gate": self._fit_gate} if self.settings.norm == "before" else {}),
        }

    def _straighten_values(self, _statistics: Statistics) -> None:
        self.mixer.conv1d.weight[: self.width, ..., -1] = SMALL

    def _forget(self, statistics: Statistics) -> None:
        """Every step is 1, and A the whole decay."""
        self.step.weight.zero_()
        self.mixer.dt_bias.copy_(softplus_inverse(torch.ones_like(self.mixer.dt_bias)))
        self.mixer.A_log.copy_((math.log(2) / statistics.half_life(self.n_heads)).log())

    def _fit_gate(self, statistics: Statistics) -> None:
        gate, scale = silu_gate(statistics, self.without_gate)
        self.gate.weight.copy_(gate.repeat_interleave(self.head_dim, dim=0))
        self.mixer.norm.weight.div_(scale)
