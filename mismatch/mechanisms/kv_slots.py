"""kv_slots: local attention, and of everything older the exact keys and values of a few chosen tokens.

Tokens are counted from the first real one of a text and cut into segments of N. A query of segment s reads, in one
softmax with the module's own scaling and softcap,

    its own segment causally, the `overlap` segments before it, the first `sinks` tokens,
    and by kv head `slots` of the far tokens (segments before s - overlap, no sinks): those of highest score

with the keys as they were rotated. This is learned KV-cache eviction. The score of a token depends on the token alone,
so the slots are merged once a segment, and older text is not read again; `parts/slots.py` defines scores, merge and
ties, `parts/local_softmax.py` the softmax. From their abstracts: KVzap (arXiv 2601.07891) scores tokens by a net on
the hidden state; DuoAttention (arXiv 2410.10819) leaves most heads local with sinks; LoLA (arXiv 2505.23666) keeps an
exact cache of tokens beside local attention and a linear memory. They are not reproduced here.

As decided here:

    slots        one number for every kv head, or one per kv head; 0 = a head without: local attention with sinks
    scores       `slot_score`; all but `learned` are controls of the choice. The net of `learned` reads what the
                 attention is given. Its last layer is zero at first: all scores tie, and the first tokens stay, until
                 `mismatch repair` trains them (stage `scores`)
    own window   a module's own window W bounds its segment and those before it, as in the teacher. Sinks and slots are
                 read beyond W, which the teacher does not. Between W and the far tokens nothing is read
    rest         `mean`: what is let go is one key more (`parts/rest.py`; not in the papers)
    sinks        a sink inside the segments that are read is an ordinary token
    padding      pads take no place in a segment and are not kept
    dtype        scores and softmax in float32 at least; keys and values are held as the module makes them, or rounded
                 to `kv_dtype` as they come (`mxint8`: `parts/mxint8.py`): a text in pieces reads what a whole one
                 reads, but where the last bits of a product, which depend on how many tokens were computed at once,
                 fall on two sides of a step
    gradients    flow to everything but through the choice, and straight through the rounding; the net has none in
                 the stages behind `scores`

Inherited: every projection, bias and query/key norm. New: the net (learned): d_model x 64, 64 x KV and biases. Dropped:
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context, tensor_kind
from mismatch.mechanisms.parts.calling import cache_in, hidden_in
from mismatch.mechanisms.parts.choosing import Choosing
from mismatch.mechanisms.parts.kv_dtype import Held
from mismatch.mechanisms.parts.local_softmax import (
    Pair,
    earlier_after,
    earlier_before,
    first_tokens,
    local_softmax,
)
from mismatch.mechanisms.parts.own_state import OwnState, entry
from mismatch.mechanisms.parts.rest import bytes_of, with_rest
from mismatch.mechanisms.parts.segments import Grid
from mismatch.mechanisms.parts.slots import UNTRAINED, Slots, per_kv_head
from mismatch.mechanisms.parts.text_by_text import text_by_text
from mismatch.mechanisms.parts.token_facts import facts_in


@dataclass(frozen=True)
class KVSlotsConfig:
    segment: Annotated[int, ">= 1"] = 64
    """Tokens per segment."""
    overlap: Annotated[int, ">= 0"] = 1
    """Segments before its own that a query reads whole."""
    sinks: Annotated[int, ">= 0"] = 1
    """First tokens of the text that every query still reads."""
    slots: Annotated[int | tuple[int, ...], ">= 0"] = 96
    """Far tokens that a kv head keeps: one number for all heads, or one for each."""
    slot_score: Literal[
        "learned", "value_norm", "key_norm", "short_key", "recent", "random", "first"
    ] = "learned"
    """What is worth keeping: a trained net, or a control of the choice."""
    rest: Literal["none", "mean"] = "none"
    """What stands for the far tokens without a slot: nothing, or their mean key and value, counted as often as they
    are."""
    kv_dtype: Literal["float16", "bfloat16", "mxint8"] | None = None
    """How keys and values are held and read, those of the segments too; none = as the module makes them. float16 ends
    at 65,504: a larger one is inf, and the output NaN. mxint8: 8 bits a number, 32 of them share a power of two."""


HELD = tuple(f"{what}_{side}" for what in ("open", "earlier", "sink", "slot") for side in "kv")
"""The rows of the state that are keys and values."""


class KVSlots(Choosing):
    """Local attention with slots over the projections of the attention it replaces."""

    Config = KVSlotsConfig
    choice: Slots
    slots = ("attn",)
    heads = True
    identity = (
        "segment * (overlap + 1) >= length, or slots >= length where the module has no window of its own; without "
        "kv_dtype"
    )
    state = (
        "per row, whatever the length: keys and values of segment * (overlap + 1) + sinks tokens, less one, and of "
        "each kv head's slots, with a float32 score of each"
    )
    source = "learned KV-cache eviction: arXiv 2601.07891, 2410.10819, 2505.23666 (abstracts)"

    def __init__(self, original: nn.Module, config: KVSlotsConfig, context: Context) -> None:
        """Raises:
        ConfigError: a list of slots that has not one number per kv head.
        SurgeryError: `rest=mean` in a module with a window of its own.
        """
        super().__init__(original, config, context)
        if config.rest == "mean" and self.window is not None:
            raise SurgeryError(
                f"{context.where}: rest=mean reads all older tokens, and this module reads the last "
                f"{self.window} only",
                hint="leave out rest in layers with a window of their own",
            )
        self.held = Held(config.kv_dtype, self.head_dim)
        self.choice = Slots(
            original,
            context,
            per_kv_head(config.slots, self.n_kv_heads),
            config.slot_score,
            overlap=config.overlap,
            size=config.segment,
            sinks=config.sinks,
        )

    def notes(self) -> tuple[str, ...]:
        notes = []
        if self.choice.net is not None and not self.context.restoring:
            notes.append(UNTRAINED)
        if self.window is not None:
            notes.append(
                f"the module's own window of {self.window} tokens is kept for the segments that are read whole; "
                "sinks and slots are read beyond it"
            )
        return tuple(notes)

    def state_bytes(self) -> int:
        config, made = self.settings, tensor_kind(self, self.context)["dtype"]
        tokens = config.segment * (config.overlap + 1) - 1 + config.sinks
        near = tokens * 2 * self.n_kv_heads * self.held.bytes_of(made)
        read = self.held.dtype(made)
        sums = bytes_of(self.n_kv_heads, self.head_dim, read) if config.rest == "mean" else 0
        return near + sums + self.choice.bytes_of(self.held.bytes_of(made))

    @text_by_text
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """As the attention it replaces: `batch pos d_model` in, (`batch pos d_model`, None) out."""
        x, cache = hidden_in(args, kwargs), cache_in(kwargs)
        config = self.settings
        state = OwnState() if cache is None else entry(cache, self.layer_idx, OwnState)
        batch, length = x.shape[:2]
        keep = facts_in(args, kwargs).real(x)
        grid = Grid(state.seen, keep, batch, length, config.segment, x.device)
        q, k, v = self.qkv(x)
        q, k = self.rotate(q, k, kwargs.get("position_embeddings"))
        rows = {
            name: self.held.unpacked(row, k.dtype) if name in HELD else row
            for name, row in state.rows.items()
        }
        k, v = self.held.rounded(k), self.held.rounded(v)
        own = Pair(grid.place(k, rows.get("open_k")), grid.place(v, rows.get("open_v")))
        earlier = Pair(
            *(
                earlier_before(rows.get(name), placed, config.overlap, config.segment)
                for name, placed in zip(("earlier_k", "earlier_v"), own, strict=True)
            )
        )
        sinks = Pair(
            first_tokens(k, rows.get("sink_k"), config.sinks, grid),
            first_tokens(v, rows.get("sink_v"), config.sinks, grid),
        )
        scores = self.choice.scores(x, k, v, grid)
        kept, held = self.choice.choose(own, earlier, scores, grid, rows)
        if config.rest == "mean":
            kept, sums = with_rest(kept, own, earlier, grid, rows, config.sinks)
            held |= sums
        with torch.autocast(x.device.type, enabled=False):
            heads, _ = local_softmax(
                grid.place(q)[..., grid.queries, :],
                own,
                grid,
                scaling=self.scaling,
                softcap=self.softcap,
                window=self.window,
                earlier=earlier,
                sinks=sinks,
                kept=kept,
                dropout=self._dropout if self.training else 0.0,
            )
        if cache is not None:
            near = {
                "open_k": grid.rest(own.k),
                "open_v": grid.rest(own.v),
                "earlier_k": earlier_after(earlier.k, own.k, grid),
                "earlier_v": earlier_after(earlier.v, own.v, grid),
                "sink_k": sinks.k,
                "sink_v": sinks.v,
            }
            after = {}
            for name, row in (near | held).items():
                if row is rows.get(name):  # as most are, between two segments
                    after[name] = state.rows[name]
                else:
                    after[name] = self.held.packed(row) if name in HELD else row
            state.advance(grid.new, length, after)
        return self.project(grid.take(heads.to(x.dtype)), x), None
