"""The modules of a pretrained attention that another token mixer can keep.

Softmax attention of every supported family is

    q, k, v = qkv(x)                 projections, biases, query/key norms; BEFORE any position
    q, k    = rotate(q, k, cos/sin)  the family's own rotary embedding (partial; layers without)
    a       = attend(q, k, v, mask)  softmax(cap(scaling q k^T)) v; query head h reads kv head
                                     h // (H / KV)
    y       = project(a, x)          the family's gate of x, where it has one; output projection

and `AttentionParts` takes these modules over from the attention that is replaced, by the attributes that
it has: the projections and norms stay the original's modules under the original's names, so their
parameters are inherited. Whatever it cannot account for is refused: another class of attention, an
unknown parameter, learned sinks, attention that is not causal. A test rebuilds softmax attention from
them and compares it with the original, for every family.

| modules | families |
|---|---|
| `q_proj k_proj v_proj o_proj` | llama mistral qwen2 qwen3 gemma2 gemma3 olmo2 olmo3 smollm3 qwen3_moe |
| the same; `q_proj`: per head [q, gate] | qwen3_5, in its layers of full attention |
| the same with `v_norm`; without `v_proj` keys are values, too | gemma4 |
| `qkv_proj o_proj`: [all q, all k, all v] | phi3 |
| `query_key_value dense`: per head [q, k, v] | gpt_neox |
| `c_attn c_proj`: [all q, all k, all v], no rotary | gpt2 |
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context, Mechanism, refuse_linear_attention
from mismatch.mechanisms.parts.linears import affine

# names of the modules that make q, k, v; then the one that makes the output
SEPARATE = (("q_proj", "k_proj", "v_proj"), "o_proj")
NORMS = ("q_norm", "k_norm", "v_norm")
FUSED = {"qkv_proj": "o_proj", "query_key_value": "dense", "c_attn": "c_proj"}
# These two read their window from the config, for every layer; the others have one per module.
WINDOW_IN_CONFIG = ("MistralAttention", "Phi3Attention")


class AttentionParts(Mechanism):
    """A mechanism built from the modules of an attention.

    Attributes:
        n_heads, n_kv_heads, head_dim: H, KV, D.
        scaling: of the logits, the module's own.
        softcap: of the logits (gemma2), or None.
        window: the module's own sliding window in tokens, or None.
        layer_idx: its entry in the cache.
        grouped: whether several query heads may read one kv head.
        gated: whether `q_proj` also makes a gate of what goes into the output projection.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    v_norm: nn.Module

    def __init__(self, original: nn.Module, config: Any, context: Context) -> None:
        """Raises:
        SurgeryError: `original` is not an attention whose every parameter is known.
        """
        super().__init__(original, config, context)
        refuse_linear_attention(
            original, context, ": it has no queries, keys and values to take over"
        )
        self._inputs, self._output = _named_parts(original, context)
        for name in (*self._inputs, self._output, *NORMS):
            if isinstance(found := getattr(original, name, None), nn.Module):
                if name in vars(original):  # no child: see `linears.stand_in`
                    vars(self)[name] = found
                else:
                    setattr(self, name, found)
        _refuse_unknown(original, self, context)
        source: Any = original  # its attributes differ by family
        model = source.config
        self.layer_idx: int = source.layer_idx
        self.head_dim: int = getattr(source, "head_dim", None) or source.head_size
        self.n_heads: int = model.num_attention_heads
        self.grouped = self._inputs[0] in ("q_proj", "qkv_proj")
        self.n_kv_heads: int = self.n_heads
        if self.grouped:  # a layer may have fewer than its config says (gemma4)
            self.n_kv_heads = self.n_heads // source.num_key_value_groups
        doubled = 2 * self.n_heads * self.head_dim
        self.gated = getattr(getattr(self, "q_proj", None), "out_features", None) == doubled
        self.scaling: float = source.scaling
        # Gemma3 sets the attribute and never uses it.
        capped = type(original).__name__ == "Gemma2Attention"
        self.softcap: float | None = source.attn_logit_softcapping if capped else None
        self.window: int | None = getattr(source, "sliding_window", None)
        if type(original).__name__ in WINDOW_IN_CONFIG:
            self.window = getattr(model, "sliding_window", None)
        self._rotary = _rotary(original)
        self._dropout: float = getattr(source, "attention_dropout", 0.0)
        self._output_dropout = 0.0
        if self._output == "c_proj":  # gpt2 keeps its dropouts as modules
            self._dropout, self._output_dropout = source.attn_dropout.p, source.resid_dropout.p

    def qkv(self, x: Tensor | tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before position encoding.

        Args:
            x: `batch pos d_model`; or three such, what queries, keys and values are made of (a
                fused projection then runs three times).

        Returns:
            q `batch H pos D`, k and v `batch KV pos D`.
        """
        q, k, v = (self._head_split(part) for part in self._projected(x))
        if getattr(self, "q_norm", None) is not None and not self._wide_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if getattr(self, "v_norm", None) is not None:
            v = self.v_norm(v)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _projected(self, x: Tensor | tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        """q, k, v flat: `batch pos heads*D`."""
        if len(self._inputs) == 3:
            x_q, x_k, x_v = x if isinstance(x, tuple) else (x, x, x)
            values = getattr(self, "v_proj", self.k_proj)  # gemma4 may have no other
            q, k, v = self._queries_and_gate(x_q)[0], self.k_proj(x_k), values(x_v)
            # olmo2 normalises over all heads at once, qwen3 and gemma3 each head.
            return (self.q_norm(q), self.k_norm(k), v) if self._wide_norm else (q, k, v)
        if isinstance(x, tuple):
            return tuple(self._projected(part)[i] for i, part in enumerate(x))
        return self._split(getattr(self, self._inputs[0])(x))

    def _split(self, fused: Tensor) -> tuple[Tensor, ...]:
        """What a fused projection gives, `... all` -> q, k, v, `... heads*D` each."""
        if self._inputs[0] == "query_key_value":
            per_head = fused.unflatten(-1, (self.n_heads, 3, self.head_dim))
            return tuple(part.flatten(-2) for part in per_head.unbind(-2))
        kv = self.n_kv_heads * self.head_dim
        return fused.split([self.n_heads * self.head_dim, kv, kv], dim=-1)

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight and bias (0 where there is none) of queries, keys and values as numbers, outside autograd:
        `heads*D d_model+1` each, float64. Not where norms stand behind them, or a gate is made too."""
        found = [affine(getattr(self, name), self.context) for name in self._inputs]
        q, k, v = found if len(found) == 3 else (w.T for w in self._split(found[0].T))
        return q, k, v

    def output_matrix(self) -> Tensor:
        """The weight of the output projection as numbers, outside autograd: `out H D`, float64. The identity where the
        heads themselves are asked for, and the projection was taken out."""
        layer = getattr(self, self._output)
        if isinstance(layer, nn.Identity):
            whole = torch.eye(self.n_heads * self.head_dim, dtype=torch.float64)
        else:
            whole = affine(layer, self.context)[:, :-1]
        return whole.unflatten(1, (self.n_heads, self.head_dim))

    def _queries_and_gate(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Both flat, `batch pos heads*D`."""
        q = self.q_proj(x)
        if not self.gated:
            return q, None
        q, gate = q.unflatten(-1, (self.n_heads, 2, self.head_dim)).unbind(-2)
        return q.flatten(-2), gate.flatten(-2)

    @property
    def _wide_norm(self) -> bool:
        norm = getattr(self, "q_norm", None)
        return norm is not None and norm.weight.shape[-1] != self.head_dim

    def _head_split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    @property
    def rotates(self) -> bool:
        """Whether positions enter by rotation here. False for a mixer that never calls `rotate`."""
        return self._rotary is not None

    def rotate(self, q: Tensor, k: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys with position in them, by the cos and sin that the model passes.

        Args:
            q, k: as from `qkv`.
            position_embeddings: (cos, sin), each `batch pos rotary`; unused where the family or
                this layer has no rotary.
        """
        return (q, k) if self._rotary is None else self._rotary(q, k, *position_embeddings)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax attention with the module's scaling and softcap.

        Args:
            q: `batch H queries D`.
            k, v: `batch KV keys D`.
            mask: bool, `batch or 1, 1, queries, keys`, True = may be read; None = causal, queries
                == keys.

        Returns:
            `batch H queries D`, dtype of `v`.
        """
        k, v = self.per_query_head(k), self.per_query_head(v)
        p = self._dropout if self.training else 0.0
        if self.softcap is None:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=p, is_causal=mask is None, scale=self.scaling
            )
        if mask is None:
            mask = q.new_ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        logits = torch.tanh(q @ k.transpose(-1, -2) * self.scaling / self.softcap) * self.softcap
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        weights = F.dropout(logits.softmax(-1, dtype=torch.float32).to(q.dtype), p)
        return weights @ v

    def per_query_head(self, x: Tensor) -> Tensor:
        """`batch KV ...` -> `batch H ...`: kv head h // (H / KV) for query head h."""
        return x if self.n_kv_heads == self.n_heads else x.repeat_interleave(self.group, dim=1)

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.n_heads // self.n_kv_heads

    def project(self, heads: Tensor, x: Tensor | None = None) -> Tensor:
        """Through the gate, where there is one, and the output projection.

        Args:
            heads: `batch H pos D`.
            x: the attention's input, `batch pos d_model`; needed for a gate, and `q_proj` then runs once more.

        Returns:
            `batch pos d_model`.

        Raises:
            SurgeryError: a gate, and no input.
        """
        flat = heads.transpose(1, 2).flatten(-2)
        if self.gated:
            if x is None:
                raise SurgeryError(
                    f"{self.context.where}: `{type(self).__name__}` does not know the gate that this family's q_proj "
                    "makes of what goes into its output projection"
                )
            gate = self._queries_and_gate(x)[1]
            assert gate is not None
            flat = flat * torch.sigmoid(gate)
        out = getattr(self, self._output)(flat)
        return F.dropout(out, self._output_dropout, self.training)


def refuse_norms(parts: AttentionParts) -> None:
    """Refuse an attention whose heads are not linear in what goes into it.

    Raises:
        SurgeryError: norms of queries, keys or values, or a gate of its own.
    """
    between = [name for name in NORMS if getattr(parts, name, None) is not None]
    if parts.gated or between:
        raise SurgeryError(
            f"{parts.context.where}: between projections and heads of this attention there is "
            f"{', '.join(between) or 'a gate'}, so no map of its heads can be folded into the projections",
            hint="families without norms of queries and keys: llama mistral qwen2 smollm3 phi3 gemma2 gpt2 gpt_neox",
        )


def _named_parts(original: nn.Module, context: Context) -> tuple[tuple[str, ...], str]:
    if all(hasattr(original, name) for name in (*SEPARATE[0], SEPARATE[1])):
        return SEPARATE
    for fused, output in FUSED.items():
        if hasattr(original, fused) and hasattr(original, output):
            return (fused,), output
    raise SurgeryError(
        f"{context.where}: {type(original).__name__} is not an attention whose projections are "
        f"known; looked for {' '.join(SEPARATE[0])} {SEPARATE[1]}, "
        + ", ".join(f"{a} {b}" for a, b in FUSED.items()),
        hint="put the mechanism into the `attn` slot of a supported family",
    )


def _refuse_unknown(original: nn.Module, parts: nn.Module, context: Context) -> None:
    """Refuse an original with anything that changes its result and is not carried over."""
    if isinstance(original, Mechanism):
        raise SurgeryError(
            f"{context.where}: the attention was already replaced by `{type(original).__name__}`",
            hint="one replacement per slot; wrappers go on top of a replacement, not below it",
        )
    known = {id(p) for p in parts.parameters()}
    lost = [name for name, p in original.named_parameters() if id(p) not in known]
    if lost:
        raise SurgeryError(
            f"{context.where}: {type(original).__name__} has parameters this mechanism would drop: "
            + ", ".join(lost),
            hint="supported: llama mistral qwen2 qwen3 gemma2 gemma3 olmo2 olmo3 phi3 smollm3 gpt2 "
            "gpt_neox qwen3_moe qwen3_5 gemma4",
        )
    if getattr(original, "is_causal", True) is not True or getattr(
        original, "is_cross_attention", False
    ):
        raise SurgeryError(
            f"{context.where}: {type(original).__name__} is not causal self-attention"
        )


def _rotary(original: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The rotary function of the family's own file; None for gpt2 and for layers without
    (smollm3)."""
    if not getattr(original, "use_rope", True):
        return None
    found = getattr(sys.modules[type(original).__module__], "apply_rotary_pos_emb", None)
    if found is not None and "q" not in inspect.signature(found).parameters:
        return functools.partial(_one_by_one, found)  # gemma4
    return found


def _one_by_one(
    rotate: Callable[..., Tensor], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return rotate(q, cos, sin), rotate(k, cos, sin)
