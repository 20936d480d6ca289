"""Several texts in one row: each runs in a row of its own, and what comes out goes back to where it belongs.

    the row              a a a a a | b b b b | c          (position_ids 0 1 2 3 4 0 1 2 3 0)
    what the module gets a a a a a     and    c           texts of like length at once, padded on the right
                         b b b b .

A mechanism that is right in a padded batch is right in a packed row by this alone: no text has a neighbour.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mismatch.mechanisms.parts.calling import (
    CACHE_NAMES,
    cache_in,
    first_of,
    hidden_in,
    with_first,
)
from mismatch.mechanisms.parts.token_facts import NAME, TokenFacts, facts_in

# What speaks of the whole row in a call: of its texts, and of which token reads which.
OF_THE_ROW = (
    "attention_mask", *CACHE_NAMES,
    "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip


def text_by_text(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The `forward` of a mechanism that reads padding from its facts, for rows of several texts too."""

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        texts = facts_in(args, kwargs).texts(hidden_in(args, kwargs), cache_in(kwargs, args))
        if texts is None:
            return forward(self, *args, **kwargs)
        return each_alone(functools.partial(forward, self), args, kwargs, texts)

    return call


def each_alone(
    forward: Callable[..., Any], args: tuple, kwargs: dict, texts: Tensor, pads: bool = True
) -> Any:
    """The output of `forward` where each text has a row of its own, without mask and cache; zeros for pads.

    Args:
        forward: of a module in the place of an attention or a block.
        args, kwargs: its call.
        texts: int64 `batch pos`, as from `TokenFacts.texts`.
        pads: whether texts of other lengths may run together, the shorter ones padded on the right and told so by
            `token_facts`: fewer calls.
    """
    x = hidden_in(args, kwargs)
    kept = {name: value for name, value in kwargs.items() if name not in OF_THE_ROW}
    kept |= {name: None for name in kwargs if name in OF_THE_ROW[: 1 + len(CACHE_NAMES)]}
    output, whole = None, None
    for rows, columns, real in _together(texts, pads):

        def part(value: Tensor, rows: Tensor = rows, columns: Tensor = columns) -> Tensor:
            return value.expand(len(x), *value.shape[1:])[rows, columns]

        named = {**kept, NAME: TokenFacts(real.shape[1], None if bool(real.all()) else real)}
        if named.get("position_ids") is not None:
            named["position_ids"] = part(named["position_ids"])
        if named.get("position_embeddings") is not None:
            named["position_embeddings"] = tuple(map(part, named["position_embeddings"]))
        if args:
            output = forward(part(x), *(None for _ in args[1:]), **named)
        else:
            output = forward(**{**named, "hidden_states": part(x)})
        y = first_of(output)
        whole = y.new_zeros(*x.shape[:2], y.shape[-1]) if whole is None else whole
        real = real.to(x.device)
        whole = whole.index_put((rows[real], columns[real]), y[real])
    return forward(*args, **kwargs) if whole is None else with_first(output, whole)


def _together(texts: Tensor, pads: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Texts that run at once: the row and the column of each of their tokens, int64 `texts longest` on the device of
    `texts`, and which are real, bool on the CPU."""
    known = texts.cpu()
    at = (known >= 0).nonzero()  # real tokens, row by row
    if len(at) == 0:
        return
    number = at[:, 0] * (known.max() + 1) + known[at[:, 0], at[:, 1]]
    counts = torch.unique_consecutive(number, return_counts=True)[1]
    starts = counts.cumsum(0) - counts
    kind = counts.float().log2().ceil() if pads else counts
    for one in kind.unique():
        chosen = kind == one
        count, column = counts[chosen, None], torch.arange(int(counts[chosen].max()))
        token = starts[chosen, None] + torch.minimum(column, count - 1)
        rows, columns = at[token].to(texts.device).unbind(-1)
        yield rows, columns, column < count
