"""mla: keys and values of all heads from one short vector a token, which the cache holds in their place.

    cached    r_t = R x_t   (rope_dim numbers, rotated, shared by all heads)      c_t = D x_t   (rank numbers)
    keys      k_h = [N_h c_t, r_t]        queries   q_h = [W_q x, B_h x rotated]        values   v_h = V_h c_t

Source: multi-head latent attention, DeepSeek-V2, arXiv 2405.04434, section 2.1; made of a trained attention as in
TransMLA, arXiv 2502.07864 (components across heads inside each rotary pair; keys and values balanced by their size).
Nothing is trained:

    R, B    In each rotary pair the kv heads are a complex vector; its principal components are turned with the position
            as the pair itself is. The rope_dim / 2 components of all pairs that would lose most without their rotation
            keep it, and all heads share them.
    N, V    What is left of the keys is read without rotation, times its mean rotation over distances of about DISTANCE
            tokens: a slow pair hardly turns, a fast one averages out. Of that and the values together the first
            principal components stay, each of the two sides divided by its size.

Components are those of what the heads give on calibration text, and an error of a key counts by the queries that read
it, one of a value by W_o (`parts/input_moment.py`; not in the paper). With init=weights they are those of the weights
alone, and all errors count alike: plain SVD. The repair stage `closed-form` then fits W_o anew.

Inherited: the output projection, and queries but where all of the keys is rotated. New: R and D (one matrix), N and V
(one), B. Dropped: the projections of keys and values. Refused: norms between projections and heads (qwen3, gemma3,
olmo2 ...), which no component passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from mismatch.errors import ConfigError
from mismatch.mechanisms.base import Context, tensor_kind
from mismatch.mechanisms.parts.host_softmax import HostSoftmax, Seen
from mismatch.mechanisms.parts.input_moment import (
    InputMoment,
    key_metric,
    moment,
    root,
    value_metric,
)
from mismatch.mechanisms.parts.linears import linear
from mismatch.mechanisms.parts.projections import refuse_norms
from mismatch.mechanisms.parts.rotary import attention_factor, own_frequencies
from mismatch.mechanisms.parts.rotary_pairs import pair_gram, rotary_width

DISTANCE = 32.0
"""Tokens, the mean of the distances (exponential) over which a rotation that is dropped is averaged. On SmolLM2, layer
12, 4 and 200 are little worse."""

FLOOR = 1e-3
"""Of keys: what is left of them and is smaller is not blown up to the size of the values."""


@dataclass(frozen=True)
class MLAConfig:
    rank: Annotated[int, ">= 1"]
    """Numbers a token of which values and keys without rotation are made; more than there are means all."""
    rope_dim: Annotated[int, ">= 0"] = 64
    """Numbers a token that are rotated, shared by all heads; even; more than there are means all."""
    init: Literal["text", "weights"] = "text"
    """Whether components are those of what heads give on calibration text, or of their weights alone."""


class MLA(HostSoftmax):
    """Softmax attention over keys and values that are made of one latent vector a token."""

    Config = MLAConfig
    slots = ("attn",)
    heads = True
    identity = "rope_dim >= the rotated channels of all kv heads, rank >= all that is left"
    state = "the host's KV cache, of rank + rope_dim numbers a token"
    source = "arXiv 2405.04434, section 2.1; of a trained attention: arXiv 2502.07864"
    pairs: Tensor

    def __init__(self, original: nn.Module, config: MLAConfig, context: Context) -> None:
        """Raises:
        ConfigError: an odd rope_dim.
        SurgeryError: norms or a gate between projections and heads; no calibration.
        """
        super().__init__(original, config, context)
        refuse_norms(self)
        if config.rope_dim % 2:
            raise ConfigError(
                f"`rope_dim` must be even, got {config.rope_dim}",
                hint="channels are rotated two by two",
                argument="rope_dim",
            )
        kv, self.width = self.n_kv_heads * self.head_dim, rotary_width(self)
        self.rope_dim = min(config.rope_dim, self.n_kv_heads * self.width)
        self.still = self.rope_dim < kv
        """Whether keys have a part without rotation."""
        self.rank = min(config.rank, 2 * kv - self.rope_dim)
        c = moment(original, context, "mla", config.init)
        q, k, v = (w.unflatten(0, (-1, self.head_dim)) for w in self.affine())
        turned, down, up, pairs = (
            self._empty(q) if c is None else self._made(q, k, v, c.to(q.device))
        )
        self._fold(q, turned, down, up)
        self.register_buffer("pairs", pairs.to(self.kv_up.weight.device))

    @classmethod
    def calibrator(cls, config: MLAConfig) -> InputMoment | None:
        return InputMoment() if config.init == "text" else None

    def notes(self) -> tuple[str, ...]:
        before = 2 * self.n_kv_heads * self.head_dim
        return (f"the cache holds {self.rank + self.rope_dim} numbers a token, not {before}",)

    # ---- weights -----------------------------------------------------------------------------

    def _fold(self, q: Tensor, turned: Tensor, down: Tensor, up: Tensor) -> None:
        """Put them into projections; the queries' own stays where it is one, and is gone where all of the keys is
        rotated."""
        kind, separate = tensor_kind(self, self.context), len(self._inputs) == 3
        old: list[Any] = [getattr(self, name, None) for name in self._inputs]
        biased = any(layer is not None and layer.bias is not None for layer in old)
        for name in self._inputs[int(separate and self.still) :]:
            del self._modules[name]

        def made(w: Tensor) -> nn.Linear:
            return linear(w[:, :-1], w[:, -1] if biased else None, kind)

        self._inputs = ("q_proj",) if self.still else ()
        if self.still and not separate:
            self.q_proj = made(q.flatten(0, 1))
        if self.rope_dim:
            self.q_turned = made(turned)
        self.kv_down, self.kv_up = made(down), linear(up, None, kind)

    def _empty(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Placeholders of the shapes that `_made` returns."""
        kv, d = self.n_kv_heads * self.head_dim, q.shape[-1]
        return (
            q.new_zeros(self.n_heads * self.rope_dim, d),
            q.new_zeros(self.rope_dim + self.rank, d),
            q.new_zeros(kv * (1 + self.still), self.rank),
            torch.zeros(self.rope_dim // 2, dtype=torch.int64),
        )

    def _made(
        self, q: Tensor, k: Tensor, v: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of what is rotated of the queries, of what is cached, of keys and values from that; and the rotated pairs.

        Args:
            q, k, v: weights and biases, `heads D d_model+1`.
            c: second moment of the inputs.
        """
        heads, half = len(k), self.width // 2
        by_query = by_output = torch.eye(self.head_dim).to(k).expand(heads, -1, -1)
        if self.settings.init == "text":
            by_query = key_metric(q, c, heads)
            by_output = value_metric(self.output_matrix().to(k), heads)
        mean = self._mean_rotation().to(k.device)
        flat = k.flatten(0, 1)
        gram = (flat @ c @ flat.mT).unflatten(1, k.shape[:2]).unflatten(0, k.shape[:2])
        size, basis = torch.linalg.eigh(pair_gram(gram, self.width))  # `pairs KV`, `pairs KV KV`
        energy = by_query.diagonal(dim1=1, dim2=2)
        energy = energy[:, :half] + energy[:, half : self.width]
        read = torch.einsum("phc,hp->pc", basis.abs().square(), energy)
        lost = size * read * (1 - mean.abs().square())[:, None]
        chosen = lost.flatten().topk(self.rope_dim // 2).indices
        pairs, component = chosen // heads, chosen % heads
        factors = basis[pairs, :, component]  # `rotated KV`
        z_k, z_q = _complex(k, half), _complex(q, half)
        shared = torch.einsum("rh,hrd->rd", factors.conj(), z_k[:, pairs])
        turned = factors.conj().T.repeat_interleave(self.group, dim=0)[..., None] * z_q[:, pairs]
        back = factors.T[..., None] * shared
        left = z_k.index_add(1, pairs, -back) * mean[:, None]
        keys = torch.cat([left.real, left.imag, k[:, self.width :]], dim=1)
        sides = [(keys, k, by_query)] * self.still + [(v, v, by_output)]
        down, up = _latent(sides, c, self.rank)
        down = torch.cat([shared.real, shared.imag, down])
        return torch.cat([turned.real, turned.imag], dim=1).flatten(0, 1), down, up, pairs

    def _mean_rotation(self) -> Tensor:
        """Of each pair, over the distances: 1 / (1 + j f DISTANCE), complex `pairs`."""
        if not self.width:
            return torch.ones(0, dtype=torch.complex128)
        own = own_frequencies(self.context.model_config, self.context.layer, self.width).double()
        return 1 / torch.complex(torch.ones_like(own), own * DISTANCE)

    # ---- forward -----------------------------------------------------------------------------

    def made(self, x: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `batch H pos D+rope_dim` (rope_dim alone where all of the keys is rotated), c in the place of keys (a
        cache counts its tokens by them, and there may be no r) and r in that of values."""
        r, c = self.kv_down(x)[:, None].split([self.rope_dim, self.rank], dim=-1)
        parts = []
        if self.still:
            parts.append(self._head_split(self.q_proj(x)).transpose(1, 2))
        if self.rope_dim:
            turned = self.q_turned(x).unflatten(-1, (self.n_heads, self.rope_dim)).transpose(1, 2)
            cos, sin = (torch.cat([t[..., self.pairs]] * 2, dim=-1) for t in position_embeddings)
            turned, r = self.rotate(turned, r, (cos, sin))
            parts.append(turned)
            if self.still:  # what YaRN puts on cos and sin scales these scores, too
                parts[0] = parts[0] * attention_factor(cos, sin).square()[:, None]
        return torch.cat(parts, dim=-1), c, r

    def read(self, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
        """The heads: keys and values are made of all that is cached."""
        made = self.kv_up(k[:, 0]).unflatten(-1, (-1, self.n_kv_heads, self.head_dim))
        made = made.permute(2, 0, 3, 1, 4)  # keys and values, `batch KV keys D` each
        r = v.expand(-1, self.n_kv_heads, -1, -1)
        keys = torch.cat([made[0], r], dim=-1) if self.still else r
        return self.attend(q, keys, made[-1], seen.mask)


def _complex(heads: Tensor, half: int) -> Tensor:
    """Rows of the rotary pairs, `heads D any` -> complex `heads half any`."""
    return torch.complex(heads[:, :half], heads[:, half : 2 * half])


def _latent(
    sides: list[tuple[Tensor, Tensor, Tensor]], c: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """The first components of all sides together: from the stream, `rank d_model+1`, and back, `all rank`.

    Args:
        sides: of each the weights `KV D d_model+1`, those of which they are what is left, and the metric in which
            errors count, `KV D D`.
        c: second moment of the inputs.
        rank: components.
    """
    scaled, undo = [], []
    for left, whole, metric in sides:
        into, out = root(metric)
        rows, size = (into @ left).flatten(0, 1), FLOOR * _size(into @ whole, c)
        size = max(size, _size(into @ left, c))
        scaled.append(rows / size)
        undo.append(torch.block_diag(*out) * size)
    both = torch.cat(scaled)
    first = torch.linalg.eigh(both @ c @ both.mT).eigenvectors[:, -rank:]
    return first.mT @ both, torch.block_diag(*undo) @ first


def _size(w: Tensor, c: Tensor) -> float:
    """Root of the mean square of what these weights give, all channels together."""
    return float(torch.einsum("had,de,hae->", w, c, w).clamp(min=0).sqrt())
