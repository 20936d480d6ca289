"""gated_attention: a sigmoid gate on what the heads give, in front of the output projection.

    y = W_o [a_0 g_0, ..., a_{H-1} g_{H-1}]         a_h = attention(x)_h
    g = 2 sigmoid(W_g x + b_g)                      elementwise: one number a channel; headwise: one a head

Source: Qiu et al., arXiv 2505.06708, section 3 (the gate behind the attention, their position G1), with two things of
this package, so that the student starts as the teacher to the bit: W_g and b_g are 0, and the sigmoid is doubled
(2 sigmoid(0) = 1). A bias stands where the paper has none, so that a gate may open or close whatever the token. x is
what the attention reads. A gate below 1 lets a token take nothing from its heads, which softmax alone cannot: the paper
finds less attention to the first token. Over an attention with a gate of its own (qwen3_5) it is one more.

Inherited: everything. New: W_g (H D x d, or H x d) and b_g. Dropped: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mismatch.mechanisms.base import Context, Wrapper, tensor_kind
from mismatch.mechanisms.parts.calling import first_of, hidden_in, with_first
from mismatch.mechanisms.parts.projections import AttentionParts
from mismatch.mechanisms.parts.some_heads import DROPOUT, headless


@dataclass(frozen=True)
class GatedAttentionConfig:
    gate: Literal["elementwise", "headwise"] = "elementwise"
    """One gate for each channel of a head, or one for the head."""


class GatedAttention(Wrapper):
    """The attention without its output projection, a gate, and the output projection."""

    Config = GatedAttentionConfig
    slots = ("attn",)
    heads = True
    identity = "at the start: the gates are 1"
    state = "the host's KV cache"
    source = "arXiv 2505.06708, section 3"

    def __init__(self, original: nn.Module, config: GatedAttentionConfig, context: Context) -> None:
        """Raises:
        SurgeryError: an attention whose heads are not known.
        """
        facts = AttentionParts(original, None, context)
        super().__init__(headless(original, facts._output), config, context)
        self._output = facts._output
        self.head_dim: int = facts.head_dim
        setattr(self, self._output, getattr(original, self._output))
        if isinstance(getattr(original, DROPOUT, None), nn.Module):
            self.resid_dropout = getattr(original, DROPOUT)
        kind, heads = tensor_kind(original, context), facts.n_heads
        width = heads if config.gate == "headwise" else heads * facts.head_dim
        self.gate_weight = nn.Parameter(torch.zeros(width, context.d_model, **kind))
        self.gate_bias = nn.Parameter(torch.zeros(width, **kind))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.original(*args, **kwargs)
        x = hidden_in(args, kwargs)
        y = getattr(self, self._output)(first_of(out) * self._gates(x))
        return with_first(out, self.resid_dropout(y) if DROPOUT in self._modules else y)

    def _gates(self, x: Tensor) -> Tensor:
        """`batch pos d_model` -> `batch pos H*D`."""
        gates = 2 * torch.sigmoid(F.linear(x, self.gate_weight, self.gate_bias))
        if self.settings.gate == "headwise":
            return gates.repeat_interleave(self.head_dim, dim=-1)
        return gates
