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
saves. Over an attention that has a window of its own, the narrower of the two counts; with sinks or
global tokens its cache entry then keeps all keys, where the host's would drop old ones. j counts real
tokens, from the first one of each text of a row.

More than CHUNK new tokens are given to the attention in pieces (unless a hook looks at its calls), each
with the keys that it may read and their mask: memory and time grow with the length, not with its square.
Inherited: everything. New, dropped: nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import (
    Context,
    Mechanism,
    Wrapper,
    innermost,
    refuse_linear_attention,
)
from mismatch.mechanisms.parts.calling import (
    CACHE_NAMES,
    cache_in,
    entry_of,
    first_of,
    hidden_in,
    with_entry,
)
from mismatch.mechanisms.parts.own_state import WholeKeys, entry
from mismatch.mechanisms.parts.token_facts import NAME, facts_in

CHUNK = 1024
"""Queries that are worked on at once; a matter of speed and memory only."""


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
    heads = True
    identity = "window >= length; over a window of the model's own without sinks and global tokens"
    state = (
        "the host's KV cache; with sinks or global tokens over its own window, all keys and values"
    )
    source = (
        "arXiv 2310.06825, section 2; sinks: arXiv 2309.17453, section 3; global tokens: arXiv "
        "2004.05150, 2007.14062"
    )
    stacks = True

    def __init__(self, original: nn.Module, config: SlidingWindowConfig, context: Context) -> None:
        """Raises:
        SurgeryError: a mechanism below that reads no mask.
        """
        super().__init__(original, config, context)
        refuse_linear_attention(original, context, ": it reads no mask of queries and keys")
        attention: Any = innermost(original)
        if isinstance(attention, Mechanism):
            raise SurgeryError(
                f"{context.where}: `{type(attention).__name__}` decides by itself what it attends "
                "to; a mask would change nothing",
                hint="put sliding_window over the model's own attention",
            )
        self.layer_idx: int = attention.layer_idx
        own, kept = _window(attention), bool(config.sinks or config.global_every)
        self.reach: int = config.window if own is None else min(config.window, own)
        # What is to be read lies behind what the host's mask shows and its cache holds.
        self._beyond_own = kept and own is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, cache = hidden_in(args, kwargs), cache_in(kwargs)
        given, past = kwargs.get("attention_mask"), 0
        held: Any = None
        if cache is not None:
            at = self.layer_idx
            held = entry(cache, at, WholeKeys) if self._beyond_own else entry_of(cache, at)
            past = int(held.get_seq_length())
        length = x.shape[1]
        # All inside the window: the mask stays what it was, to the bit (None picks another kernel).
        if past + length <= self.reach and (given is None or not isinstance(held, WholeKeys)):
            return self.original(*args, **kwargs)
        keys, offset = past + length, 0
        if held is not None and not isinstance(held, WholeKeys):
            keys, offset = held.get_mask_sizes(length)
        reads = self._reads(args, kwargs, past, keys, offset)
        if length > CHUNK and not _watched(innermost(self.original)):
            return self._in_chunks(args, kwargs, held, reads)
        mask = reads.mask(slice(0, length), offset + torch.arange(keys, device=x.device))
        return self.original(*args, **{**kwargs, "attention_mask": mask})

    def _reads(self, args: tuple, kwargs: dict, past: int, keys: int, offset: int) -> Reads:
        """What the new tokens read of so many keys, the first of which has the number `offset`."""
        x, cache, facts = hidden_in(args, kwargs), cache_in(kwargs), facts_in(args, kwargs)
        given, kept, real, texts, added = kwargs.get("attention_mask"), None, None, None, None
        if given is not None and given.ndim != 4:
            raise SurgeryError(
                f"{self.context.where}: the host passes its attention a {given.ndim}-D mask; "
                "a window needs 4-D",
                hint="load the model with attn_implementation='sdpa' or 'eager'",
            )
        if self.settings.sinks or self.settings.global_every:
            number = facts.numbers(keys, offset, x, cache)
            kept = self._kept(
                offset + torch.arange(keys, device=x.device)[None] if number is None else number
            )
            if self._beyond_own:
                real = None if number is None else number >= 0
        if self._beyond_own:
            texts = facts.texts(x, cache)
            attention: Any = innermost(self.original)
            eager = attention.config._attn_implementation == "eager"
            added = x.dtype if eager else None
            given = None
        return Reads(self.reach, past, offset, given, kept, real, texts, added)

    def _kept(self, number: Tensor) -> Tensor:
        """Which keys are a sink or a global token, by their number in their text, -1 = a pad: bool
        `batch or 1, keys`."""
        kept, every = number < self.settings.sinks, self.settings.global_every
        if every:
            kept = kept | (number % every == 0)
        return kept & (number >= 0)

    def _in_chunks(
        self, args: tuple, kwargs: dict[str, Any], held: Any, reads: Reads
    ) -> tuple[Tensor, None]:
        """The output for many tokens: CHUNK queries at a time, each with the keys that it may read."""
        x, cache, layer = hidden_in(args, kwargs), cache_in(kwargs), self.layer_idx
        chosen, outputs = Chosen(DynamicLayer() if held is None else held), []
        name = next((name for name in CACHE_NAMES if name in kwargs), CACHE_NAMES[0])
        alone: list[Any] = [chosen] * (layer + 1)
        view = Cache(layers=alone) if cache is None else with_entry(cache, layer, chosen)
        named = {key: value for key, value in kwargs.items() if key != NAME} | {name: view}
        for start in range(0, x.shape[1], CHUNK):
            rows = slice(start, min(start + CHUNK, x.shape[1]))
            chosen.numbers = reads.keys(rows, x.device)
            named["attention_mask"] = reads.mask(rows, chosen.numbers)
            if kwargs.get("position_ids") is not None:
                named["position_ids"] = kwargs["position_ids"][:, rows]
            if kwargs.get("position_embeddings") is not None:
                named["position_embeddings"] = tuple(
                    angles[:, rows] for angles in kwargs["position_embeddings"]
                )
            part = x[:, rows].contiguous()  # gpt2 takes no other
            if args:
                output = self.original(part, *args[1:], **named)
            else:
                output = self.original(**{**named, "hidden_states": part})
            outputs.append(first_of(output))
        return torch.cat(outputs, dim=1), None


class Chosen:
    """A cache entry of which the attention is shown some keys only, those with `numbers` (int64 `keys`)."""

    numbers: Tensor

    def __init__(self, entry: Any) -> None:
        self.entry = entry

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        whole = isinstance(self.entry, WholeKeys)
        offset = 0 if whole else self.entry.get_mask_sizes(k.shape[2])[1]
        k, v = self.entry.update(k, v, *args, **kwargs)
        # Copies: a view would keep the keys of every chunk alive for the backward pass.
        at = self.numbers - offset
        return k.index_select(2, at), v.index_select(2, at)


@dataclass(frozen=True)
class Reads:
    """Which of the new tokens reads which key.

    Attributes:
        reach: tokens that a query reads, itself included, besides those that are kept.
        past: tokens before the first new one.
        offset: the number of the first key of `given`, `kept`, `real` and `texts`.
        given: the host's mask, `batch or 1, 1, new, keys`, bool or added; None = causal and no padding.
        kept, real: bool `batch or 1, keys`, which are read by every later query, and which are no pads.
        texts: int64 `batch, keys`, the text of each token; None = one a row.
        added: dtype of a mask that is to be added, where `given` is None; None = a bool one.
    """

    reach: int
    past: int
    offset: int
    given: Tensor | None
    kept: Tensor | None
    real: Tensor | None
    texts: Tensor | None
    added: torch.dtype | None

    @functools.cached_property
    def _kept_numbers(self) -> Tensor:
        assert self.kept is not None
        return self.offset + self.kept.any(0).nonzero()[:, 0]

    def keys(self, rows: slice, device: torch.device) -> Tensor:
        """The numbers of the keys that any of these queries may read, int64, rising."""
        first = max(0, self.past + rows.start - self.reach + 1)
        near = torch.arange(first, self.past + rows.stop, device=device)
        if self.kept is None:
            return near
        return torch.cat([self._kept_numbers[self._kept_numbers < first], near])

    def mask(self, rows: slice, keys: Tensor) -> Tensor:
        """For these queries and the keys with these numbers: `batch or 1, 1, queries, keys`, bool or added."""
        at = keys - self.offset
        i = self.past + torch.arange(rows.start, rows.stop, device=keys.device)[:, None]
        allowed = keys > i - self.reach
        if self.kept is not None:
            allowed = allowed | self.kept[:, None, at]
        allowed = allowed & (keys <= i)
        if self.real is not None:
            allowed = allowed & self.real[:, None, at]
        if self.texts is not None:
            allowed = allowed & (self.texts[:, rows, None] == self.texts[:, None, at])
        if self.given is None:
            allowed = allowed | (keys == i)  # no query without a key
        allowed = allowed.view(-1, 1, *allowed.shape[-2:])
        if self.given is not None:
            given = self.given[:, :, rows][..., at]
        elif self.added is not None:
            given = torch.zeros(allowed.shape, dtype=self.added, device=allowed.device)
        else:
            return allowed
        if given.dtype == torch.bool:
            return given & allowed
        return given.masked_fill(~allowed, torch.finfo(given.dtype).min)


def _watched(attention: nn.Module) -> bool:
    """Whether a hook looks at its calls: it is then called once, for all tokens."""
    return bool(attention._forward_pre_hooks or attention._forward_hooks)


def _window(attention: nn.Module) -> int | None:
    """The attention's own window; Mistral and Phi-3 read theirs from the config, for every
    layer."""
    if type(attention).__name__ in ("MistralAttention", "Phi3Attention"):
        return getattr(attention.config, "sliding_window", None)
    return getattr(attention, "sliding_window", None)
