"""rwkv: RWKV-7 time mixing, a recurrent matrix per head that forgets by channel and overwrites by key.

Source: arXiv 2503.14456 (RWKV-7 "Goose"), time mixing; initial values and eps as in the authors'
training code (BlinkDL/RWKV-LM RWKV-v7/train_temp/src/model.py @118e451). Per token, with x' the
token before it (0 before the first) and x_* = x + mu_* (x' - x) for * in r w k v a g:

    r, k, v = W_r x_r, W_k x_k, W_v x_v
    w       = exp(-exp(-1/2) sigmoid(w0 + tanh(x_w W1) W2))      decay per channel, in (0.545, 1)
    a       = sigmoid(a0 + x_a A1 A2)                            in-context learning rate
    g       = sigmoid(x_g G1) G2                                 output gate
    kappa   = k * k_k / |k * k_k| per head                       key that is removed
    k~      = k * (1 + (a - 1) * k_a)                            key that is written
    S_t     = S_{t-1} (diag(w) - kappa^T (a * kappa)) + v^T k~   per head, D x D
    p       = GroupNorm(S_t r) + (r . (r_k * k~)) v              per head; the bonus sees token t
    y       = W_o (g * p)

Run in chunks (`delta_rule.py`); per token it is one chunk of one. This is the form of RWKV-7's
layer 0: layers above it blend v with the v of layer 0 (`v_first`), which a lone layer has not.

init=inherit (after RADLADS, arXiv 2505.03005, which copies q, k, v, o): W_r, W_k, W_v, W_o are the
attention's query, key, value and output projections, with biases and query/key norms; kv head
h // (H / KV) serves head h. So that they read and write at first what they were trained on, mu = 0
(no shift), r_k = 0 (no bonus), G2 such that g = 1, and the scale of GroupNorm is one number, such
that y has the root mean square of the attention's output on calibration text (with a scale of 1,
layer 12 of SmolLM2 is four times too loud). W1 and A1 are small and not 0, so that W2 and A2 have
a gradient from the first step. The rest is the authors'. init=fresh: everything is the authors',
nothing is inherited; their W_o is 0, so that the layer adds nothing before it is trained.

Ranks, as the authors suggest: of W1 and A1 2.5 sqrt(d_model), of G1 5 sqrt(d_model), to the nearest
32 (64, 64, 128 at 576).

Inherited: every projection, bias and query/key norm (fresh: nothing). New: mu, w0, W1, W2, a0, A1,
A2, G1, G2, k_k, k_a, r_k, and GroupNorm's scale and bias. Dropped: the rotary embedding, the softmax
with its scaling, softcap and window; value residual and channel mixing are not part of it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context, need_calibration, tensor_kind
from mismatch.mechanisms.parts.calling import cache_in, hidden_in
from mismatch.mechanisms.parts.delta_rule import chunked_delta_rule
from mismatch.mechanisms.parts.initial_values import WRITE, Statistics, sigmoid_gate
from mismatch.mechanisms.parts.linears import dense, matrix
from mismatch.mechanisms.parts.own_state import OwnState, entry
from mismatch.mechanisms.parts.projections import NORMS, SEPARATE, AttentionParts
from mismatch.mechanisms.parts.text_by_text import text_by_text
from mismatch.mechanisms.parts.token_facts import facts_in

FASTEST = math.exp(-0.5)  # largest -log w
EPS = 1e-5  # of GroupNorm, per channel of a head: the authors' 64e-5 at 64
NEARLY_ZERO = 1e-2  # scale of W1 and A1 under init=inherit
SHORTEST = 0.95  # sigmoid(w0), at most


@dataclass(frozen=True)
class RWKVConfig:
    init: Literal["inherit", "fresh"] = "inherit"
    """inherit: projections of the attention it replaces; fresh: RWKV-7's own initial values, whose
    output is 0."""


class OutputPower:
    """Running mean of a module's outputs and of their squared length over bulk tokens, float64."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.squares = 0.0
        self.count = 0

    def update(self, inputs: Tensor, outputs: Tensor, keep: Tensor) -> None:
        kept = outputs[keep].double()
        total = kept.sum(0).cpu()
        self.total = total if self.total is None else self.total + total
        self.squares += kept.square().sum().item()
        self.count += kept.shape[0]

    def around(self, bias: Tensor | None) -> float:
        """Mean squared length of `output - bias`; bias `d_model`.

        Raises:
            SurgeryError: no token was seen.
        """
        if self.total is None or self.count == 0:
            raise SurgeryError(
                "the calibration text has no usable token", hint="give a longer text"
            )
        power = self.squares / self.count
        if bias is None:
            return power
        bias = bias.detach().double().cpu()
        return power - 2 * (bias @ self.total).item() / self.count + bias.square().sum().item()


class RWKV(AttentionParts):
    """RWKV-7 time mixing over the projections of the attention it replaces."""

    Config = RWKVConfig
    slots = ("attn",)
    heads = ("init", "inherit")
    identity = "none: a state of fixed size is no softmax over all tokens"
    state = (
        "per row and head one matrix (D x D) in float32 and per row the last token's input "
        "(d_model), whatever the length"
    )
    source = "arXiv 2503.14456 (RWKV-7), initial values of init=inherit after arXiv 2505.03005"

    # Shapes in `initial`; the letters are those of the module docstring.
    mu: nn.Parameter
    w0: nn.Parameter
    w1: nn.Parameter
    w2: nn.Parameter
    a0: nn.Parameter
    a1: nn.Parameter
    a2: nn.Parameter
    g1: nn.Parameter
    g2: nn.Parameter
    k_k: nn.Parameter
    k_a: nn.Parameter
    r_k: nn.Parameter
    ln_x: nn.Parameter
    ln_x_bias: nn.Parameter

    def __init__(self, original: nn.Module, config: RWKVConfig, context: Context) -> None:
        super().__init__(original, config, context)
        fresh = config.init == "fresh"
        if self.gated and not fresh:
            raise SurgeryError(
                f"{context.where}: this attention gates its output, and so does rwkv: how loud both together are is "
                "not known before they run",
                hint="rwkv(init=fresh)",
            )
        loudness = 1.0 if fresh else self._loudness(original)
        kind = tensor_kind(original, context)
        # On the CPU in float32 whatever the model is, so that every device starts the same.
        with torch.device("cpu"):
            values = initial(self, context, fresh, loudness)
        if fresh:
            self._drop_projections()
        for name, value in values.items():
            weight = nn.Parameter(value.to(**kind))
            if name in (*SEPARATE[0], SEPARATE[1]):
                outputs, inputs = value.shape
                linear = nn.Linear(inputs, outputs, bias=False, device="meta")
                linear.weight = weight
                setattr(self, name, linear)
            else:
                setattr(self, name, weight)

    @classmethod
    def calibrator(cls, config: RWKVConfig) -> OutputPower | None:
        return OutputPower() if config.init == "inherit" else None

    def _loudness(self, original: nn.Module) -> float:
        """The scale of GroupNorm at which W_o turns white heads into the rms of the attention's output."""
        measured = need_calibration(original, self.context, "rwkv")
        if measured is None:
            return 1.0
        output = getattr(self, self._output)
        if isinstance(output, nn.Identity):  # of some heads, which are measured in front of W_o
            return math.sqrt(measured.around(None) / (self.n_heads * self.head_dim))
        gain = matrix(dense(output, self.context)).double().square().sum().item()
        return math.sqrt(measured.around(output.bias) / gain)

    def _drop_projections(self) -> None:
        """Make room for projections of its own, one key and value head per query head."""
        for name in (*self._inputs, self._output, *NORMS):
            self._modules.pop(name, None)
        self._inputs, self._output, self.gated = *SEPARATE, False
        self.n_kv_heads = self.n_heads

    @property
    def rotates(self) -> bool:
        return False

    def notes(self) -> tuple[str, ...]:
        if self.window is None:
            return ()
        return (
            f"the module's own window of {self.window} tokens is gone: the state reaches back to "
            "the first token",
        )

    @text_by_text
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """As the attention it replaces: `batch pos d_model` in, (`batch pos d_model`, None) out."""
        x, cache = hidden_in(args, kwargs), cache_in(kwargs)
        state = OwnState() if cache is None else entry(cache, self.layer_idx, OwnState)
        keep = facts_in(args, kwargs).real(x)
        before, last = token_before(x, state.rows.get("last"), keep)
        x_r, x_w, x_k, x_v, x_a, x_g = torch.addcmul(x, before - x, self.mu[:, None, None])
        r, k, v = self.qkv((x_r, x_k, x_v))
        wide = torch.promote_types(x.dtype, torch.float32)
        decay = self.w0.to(wide) + torch.tanh(x_w @ self.w1) @ self.w2
        rate = self.a0.to(wide) + x_a @ self.a1 @ self.a2
        gate = torch.sigmoid(x_g @ self.g1) @ self.g2
        decay, rate, gate = (self._head_split(y).transpose(1, 2) for y in (decay, rate, gate))
        with torch.autocast(x.device.type, enabled=False):
            heads, matrix = self._remember(r, k, v, decay, rate, keep, state.rows.get("state"))
        if cache is not None:
            new = torch.full(x.shape[:1], x.shape[1]) if keep is None else keep.sum(1).cpu()
            state.advance(new, x.shape[1], {"state": matrix, "last": last})
        return self.project(heads.to(x.dtype) * gate, x), None

    def _remember(
        self, r: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor,
        keep: Tensor | None, matrix: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """p, `batch H pos D`, and S after the last token (keys by values), float32 at least.

        Args:
            r, decay, rate: `batch H pos D`, the last two before their sigmoid and in the dtype of S.
            k, v: `batch KV pos D`.
            keep: bool `batch pos`, real tokens; None = all. Pads leave S as it is.
            matrix: S before the first token, `batch H D D`; None = 0.
        """
        wide = decay.dtype
        k, v = self.per_query_head(k), self.per_query_head(v)
        r, k, v = (y.to(wide) for y in (r, k, v))
        k_k, k_a, r_k, scale, bias = (
            y.to(wide)[:, None] for y in (self.k_k, self.k_a, self.r_k, self.ln_x, self.ln_x_bias)
        )
        log_w, a = -FASTEST * torch.sigmoid(decay), torch.sigmoid(rate)
        kappa = F.normalize(k * k_k, dim=-1)
        k = k * (1 + (a - 1) * k_a)
        if keep is not None:
            pad = ~keep[:, None, :, None]
            log_w, kappa, k = (y.masked_fill(pad, 0) for y in (log_w, kappa, k))
        if matrix is None:
            matrix = r.new_zeros(*r.shape[:2], self.head_dim, self.head_dim)
        read, matrix = chunked_delta_rule(r, log_w, k, v, -kappa, kappa * a, matrix)
        normed = F.layer_norm(read, (self.head_dim,), eps=EPS * self.head_dim) * scale + bias
        return normed + (r * k * r_k).sum(-1, keepdim=True) * v, matrix

    # ---- initial values from the attention's statistics ------------------------------------------

    def initial_values(self) -> dict[str, Callable[[Statistics], None]]:
        """Without `keys`: queries and keys meet in a plain product here, in which the mean key is the average over the
        text, and without it a head gives less of what the attention gives."""
        if self.settings.init == "fresh":
            return {}
        fits = self.n_heads <= self.g1.shape[1]
        return {
            "half-life": self._forget,
            "write": self._write_less,
            **({"gate": self._fit_gate} if fits else {}),
        }

    def _forget(self, statistics: Statistics) -> None:
        """exp(-1/2) sigmoid(w0) = ln 2 / half-life, as far as the form allows: 1.14 tokens."""
        rate = math.log(2) / statistics.half_life(self.n_heads) / FASTEST
        self.w0.copy_(rate.clamp(max=SHORTEST).logit().repeat_interleave(self.head_dim))

    def _write_less(self, _statistics: Statistics) -> None:
        self.a0.fill_(WRITE)

    def _fit_gate(self, statistics: Statistics) -> None:
        """One column of G1 a head; the others stay as they are, and their rows of G2 add up to 0."""
        gate, scale = sigmoid_gate(statistics, self.without_gate, alike=False)
        heads = self.n_heads
        self.g1[:, :heads] = gate.T.to(self.g1)
        own = torch.block_diag(*scale[:, None, None].expand(-1, 1, self.head_dim))
        self.g2[:heads] = own.to(self.g2)
        self.g2[heads:] -= self.g2[heads:].mean(0)

    def without_gate(self, *args: Any, **kwargs: Any) -> Tensor:
        """p, `batch H pos D`: the heads with every gate at 1."""
        x = hidden_in(args, kwargs)
        r, k, v = self.qkv(x)
        decay, rate = self.w0 + torch.tanh(x @ self.w1) @ self.w2, self.a0 + x @ self.a1 @ self.a2
        decay, rate = (self._head_split(y).transpose(1, 2) for y in (decay, rate))
        return self._remember(r, k, v, decay, rate, None, None)[0]


def token_before(x: Tensor, last: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token shift: the real token before each one.

    Args:
        x: `batch pos d_model`.
        last: the last real token of earlier calls, `batch d_model`; None = there was none.
        keep: bool `batch pos`, real tokens of this call; None = all.

    Returns:
        the tokens before, `batch pos d_model` (zeros before the first), and the last real token of
        each row now, `batch d_model`.
    """
    last = torch.zeros_like(x[:, 0]) if last is None else last
    stream = torch.cat([last[:, None], x], dim=1)
    if keep is None:
        # Cloned: a view would keep the whole input alive in the cache.
        return stream[:, :-1], x[:, -1].clone()
    column = torch.arange(1, x.shape[1] + 1, device=x.device) * keep
    newest = F.pad(column, (1, 0)).cummax(1).values  # in `stream`, of the real tokens up to here
    at = newest[..., None].expand(-1, -1, x.shape[2])
    return stream.gather(1, at[:, :-1]), stream.gather(1, at[:, -1:])[:, 0]


def initial(mixer: RWKV, context: Context, fresh: bool, loudness: float) -> dict[str, Tensor]:
    """Values of every new tensor, float32; draws depend on seed, slot and name alone."""
    d_model, inner = context.d_model, mixer.n_heads * mixer.head_dim
    per_head = (mixer.n_heads, mixer.head_dim)
    layer = context.layer
    assert layer is not None  # an attention stands in a block
    depth = layer / max(1, context.n_layers - 1)
    along = torch.arange(inner) / max(1, inner - 1)  # 0 .. 1 over all channels
    ramp = 2 * torch.arange(mixer.head_dim) / max(1, mixer.head_dim - 1) - 1  # -1 .. 1 in a head
    zigzag = (ramp * ramp.abs()).repeat(mixer.n_heads)
    low, gate = rank(2.5, d_model), rank(5, d_model)

    def orthogonal(name: str, rows: int, columns: int, scale: float) -> Tensor:
        gain = scale * max(1.0, rows / columns) ** 0.5
        generator = torch.Generator().manual_seed(
            zlib.crc32(f"{context.seed}/{context.where}/{name}".encode())
        )
        return nn.init.orthogonal_(torch.empty(rows, columns), gain=gain, generator=generator)

    values = {
        "mu": torch.zeros(6, d_model),
        "w0": 6 * along ** (1 + depth**0.3) - 5.5 + 2.5 * zigzag,
        "w1": orthogonal("w1", d_model, low, NEARLY_ZERO),
        "w2": orthogonal("w2", low, inner, 0.1),
        "a0": -0.19 + 0.3 * zigzag + 0.4 * (along - 0.5),
        "a1": orthogonal("a1", d_model, low, NEARLY_ZERO),
        "a2": orthogonal("a2", low, inner, 0.1),
        "g1": torch.zeros(d_model, gate),
        "g2": orthogonal("g2", gate, inner, 0.1),
        "k_k": 0.71 - 0.1 * (along - 0.5).view(per_head),
        "k_a": torch.full(per_head, 1.02),
        "r_k": torch.zeros(per_head),
        "ln_x": torch.full(per_head, loudness),
        "ln_x_bias": torch.zeros(per_head),
    }
    if not fresh:
        # sigmoid(0) = 1/2 of each row: g = 1. Rows differ, so that G1 can learn.
        values["g2"] = values["g2"] - values["g2"].mean(0) + 2 / gate
        return values
    toward = 1 - layer / context.n_layers
    power = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])[:, None] * toward  # r w k v a g
    return values | {
        "mu": 1 - (torch.arange(d_model) / d_model) ** power,
        "w1": torch.zeros(d_model, low),
        "a1": torch.zeros(d_model, low),
        "r_k": torch.full(per_head, -0.04),
        "ln_x": torch.full(per_head, ((1 + layer) / context.n_layers) ** 0.7),
        "q_proj": orthogonal("q_proj", inner, d_model, 1.0),
        "k_proj": orthogonal("k_proj", inner, d_model, 0.1),
        "v_proj": orthogonal("v_proj", inner, d_model, 1.0),
        "o_proj": torch.zeros(d_model, inner),
    }


def rank(factor: float, d_model: int) -> int:
    """`factor * sqrt(d_model)` to the nearest 32, at least 32."""
    return max(32, round(factor * math.sqrt(d_model) / 32) * 32)
