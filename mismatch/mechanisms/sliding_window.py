"""sliding_window: the host's own attention under a narrower mask, first tokens kept as sinks.

    query i reads key j   iff   j <= i and (i - j < window or j is one of the first `sinks` tokens)

The window is that of Mistral (arXiv 2310.06825, section 2), the sinks are those of StreamingLLM
(arXiv 2309.17453, section 3). Only the mask changes: projections, rotary embedding and scores are
the host's, at their true positions (StreamingLLM renumbers positions inside its cache; within the
trained length that is not needed). The KV cache is the host's too and is not cut, so this measures
what a window loses, not what it saves. Padding is respected: sinks are the first REAL tokens of
each row. Inherited: everything. New, dropped: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context, Mechanism, Wrapper, innermost
from mismatch.mechanisms.calling import cache_in, hidden_in


@dataclass(frozen=True)
class SlidingWindowConfig:
    window: Annotated[int, ">= 1"] = 256
    """Tokens that a query reads, itself included."""
    sinks: Annotated[int, ">= 0"] = 0
    """First tokens of the text that every query goes on reading."""


class SlidingWindow(Wrapper):
    """Hands the wrapped attention a mask with a window in it."""

    Config = SlidingWindowConfig
    slots = ("attn",)
    identity = "window >= length"
    state = "the host's full KV cache"
    source = "arXiv 2310.06825, section 2; sinks: arXiv 2309.17453, section 3"
    stacks = True

    def __init__(self, original: nn.Module, config: SlidingWindowConfig, context: Context) -> None:
        """Raises:
        SurgeryError: a mechanism below that reads no mask; or sinks over an attention that has a
            window of its own
            and drops old keys.
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
        if own is not None and config.sinks > 0:
            raise SurgeryError(
                f"{context.where}: this attention has its own window of {own} tokens, and its "
                "cache drops what lies behind: sinks cannot be kept",
                hint="use sinks=0, or a layer with full attention",
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        length, cache = hidden_in(args, kwargs).shape[1], cache_in(kwargs)
        past, keys, offset = 0, length, 0
        if cache is not None:
            layer = self.original.layer_idx
            past = cache.get_seq_length(layer)
            keys, offset = cache.get_mask_sizes(length, layer)
        # All inside the window: the mask stays what it was, to the bit (None picks another kernel).
        if past + length > self.settings.window:
            mask = self._mask(kwargs.get("attention_mask"), past, length, keys, offset)
            kwargs = {**kwargs, "attention_mask": mask}
        return self.original(*args, **kwargs)

    def _mask(self, given: Tensor | None, past: int, length: int, keys: int, offset: int) -> Tensor:
        """The given mask and the window: `batch or 1, 1, length, keys`, of the given kind (bool, or
        added floats).

        Args:
            given: the host's mask, or None = causal and no padding.
            past: number of tokens before the first query.
            length: queries.
            keys, offset: how many keys the host's cache hands out, and the number of the first.
        """
        if given is not None and given.ndim != 4:
            raise SurgeryError(
                f"{self.context.where}: the host hands its attention a {given.ndim}-D mask; "
                "a window needs 4-D",
                hint="load the model with attn_implementation='sdpa' or 'eager'",
            )
        device = self._device(given)
        i = past + torch.arange(length, device=device)[:, None]
        j = offset + torch.arange(keys, device=device)
        allowed = ((i - j < self.settings.window) & (j <= i))[None, None]
        if self.settings.sinks:
            allowed = allowed | (self._sinks(j) & (j <= i))
        if given is None:
            return allowed
        if given.dtype == torch.bool:
            return given & allowed
        return given.masked_fill(~allowed, torch.finfo(given.dtype).min)

    def _device(self, given: Tensor | None) -> torch.device:
        return next(self.original.parameters()).device if given is None else given.device

    def _sinks(self, j: Tensor) -> Tensor:
        """Whether key j is one of the first real tokens of its row: bool `batch or 1, 1, 1,
        keys`."""
        real = self.context.host.full()
        if real is None:
            return (j < self.settings.sinks)[None, None, None]
        first = real & (real.cumsum(1) <= self.settings.sinks)
        return first[:, j][:, None, None]


def _window(attention: nn.Module) -> int | None:
    """The attention's own window; Mistral and Phi-3 read theirs from the config, for every
    layer."""
    if type(attention).__name__ in ("MistralAttention", "Phi3Attention"):
        return getattr(attention.config, "sliding_window", None)
    return getattr(attention, "sliding_window", None)
