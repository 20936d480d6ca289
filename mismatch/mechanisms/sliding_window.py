"""sliding_window: the host's own attention under a narrower mask, some tokens visible to every query.

    query i reads key j   iff   j <= i and ( i - j < window
                                             or j < sinks
                                             or global_every > 0 and j mod global_every = 0 )

The window is that of Mistral (arXiv 2310.06825, section 2), the sinks are those of StreamingLLM
(arXiv 2309.17453, section 3). Global tokens are every k-th token, read by every later query: the
causal half of the global attention of Longformer (arXiv 2004.05150, section 3.1) and BigBird (arXiv
2007.14062, section 2). There a global token also reads everything; here its own query has the
window of any other, as in the fixed pattern of the Sparse Transformer (arXiv 1904.10509). Only the
mask changes: projections, rotary embedding and scores are the host's, at their true positions
(StreamingLLM renumbers positions inside its cache; within the trained length that is not needed).
The KV cache is the host's too and is not cut, so this measures what a window loses, not what it
saves. j counts real tokens, from the first one of each text of a row. Inherited: everything. New,
dropped: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context, Mechanism, Wrapper, innermost
from mismatch.mechanisms.parts.calling import cache_in, hidden_in
from mismatch.mechanisms.parts.token_facts import facts_in

WORDS = {"sinks": "sinks", "global_every": "global tokens"}


@dataclass(frozen=True)
class SlidingWindowConfig:
    window: Annotated[int, ">= 1"] = 256
    """Tokens that a query reads, itself included."""
    sinks: Annotated[int, ">= 0"] = 0
    """First tokens of the text that every query still reads."""
    global_every: Annotated[int, ">= 0"] = 0
    """Every so many-th token, the first included, is read by every later query; 0 = none."""


class SlidingWindow(Wrapper):
    """Passes a mask with a window to the wrapped attention."""

    Config = SlidingWindowConfig
    slots = ("attn",)
    identity = "window >= length"
    state = "the host's full KV cache"
    source = (
        "arXiv 2310.06825, section 2; sinks: arXiv 2309.17453, section 3; global tokens: arXiv "
        "2004.05150, 2007.14062"
    )
    stacks = True

    def __init__(self, original: nn.Module, config: SlidingWindowConfig, context: Context) -> None:
        """Raises:
        SurgeryError: a mechanism below that reads no mask; or sinks or global tokens over an
            attention that has a window of its own and drops old keys.
        """
        super().__init__(original, config, context)
        attention = innermost(original)
        if isinstance(attention, Mechanism):
            raise SurgeryError(
                f"{context.where}: `{type(attention).__name__}` decides by itself what it attends "
                "to; a mask would change nothing",
                hint="put sliding_window over the model's own attention",
            )
        own = _window(attention)
        kept = {"sinks": config.sinks, "global_every": config.global_every}
        for name in (name for name, value in kept.items() if value and own is not None):
            raise SurgeryError(
                f"{context.where}: this attention has its own window of {own} tokens, and its "
                f"cache drops what lies behind: {WORDS[name]} cannot be kept",
                hint=f"use {name}=0, or a layer with full attention",
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, cache = hidden_in(args, kwargs), cache_in(kwargs)
        past, keys, offset = 0, x.shape[1], 0
        if cache is not None:
            layer = self.original.layer_idx
            past = cache.get_seq_length(layer)
            keys, offset = cache.get_mask_sizes(x.shape[1], layer)
        # All inside the window: the mask stays what it was, to the bit (None picks another kernel).
        if past + x.shape[1] > self.settings.window:
            i = past + torch.arange(x.shape[1], device=x.device)[:, None]
            j = offset + torch.arange(keys, device=x.device)
            allowed = (i - j < self.settings.window)[None, None]
            if self.settings.sinks or self.settings.global_every:
                number = facts_in(args, kwargs).numbers(keys, offset, x, cache)
                allowed = allowed | self._kept(j[None] if number is None else number)
            mask = self._mask(kwargs.get("attention_mask"), allowed & (j <= i))
            kwargs = {**kwargs, "attention_mask": mask}
        return self.original(*args, **kwargs)

    def _mask(self, given: Tensor | None, allowed: Tensor) -> Tensor:
        """The given mask and the window: `batch or 1, 1, queries, keys`, of the given kind (bool, or
        added floats).

        Args:
            given: the host's mask, or None = causal and no padding.
            allowed: bool, what the window lets each query read.
        """
        if given is None:
            return allowed
        if given.ndim != 4:
            raise SurgeryError(
                f"{self.context.where}: the host passes its attention a {given.ndim}-D mask; "
                "a window needs 4-D",
                hint="load the model with attn_implementation='sdpa' or 'eager'",
            )
        if given.dtype == torch.bool:
            return given & allowed
        return given.masked_fill(~allowed, torch.finfo(given.dtype).min)

    def _kept(self, number: Tensor) -> Tensor:
        """Which keys are a sink or a global token, by their number in their text, -1 = a pad:
        `batch or 1, keys` -> bool `batch or 1, 1, 1, keys`."""
        kept, every = number < self.settings.sinks, self.settings.global_every
        if every:
            kept = kept | (number % every == 0)
        return (kept & (number >= 0))[:, None, None]


def _window(attention: nn.Module) -> int | None:
    """The attention's own window; Mistral and Phi-3 read theirs from the config, for every
    layer."""
    if type(attention).__name__ in ("MistralAttention", "Phi3Attention"):
        return getattr(attention.config, "sliding_window", None)
    return getattr(attention, "sliding_window", None)
