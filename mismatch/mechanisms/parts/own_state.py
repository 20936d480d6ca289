"""The cache entry of a mechanism that keeps its own state: a recurrent matrix, a memory, an open segment.

What `generate()` does to a cache (reorder beams, repeat, select, reset) is done here to every row
of the state. It reports the true number of tokens, because transformers takes positions from layer
0's entry. A mechanism writes `rows` and calls `advance`; nothing goes through transformers' `update`.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from mismatch.errors import SurgeryError
from mismatch.mechanisms.parts.calling import entry_of

LENGTH_OF = {False: "cumulative_length", True: "cumulative_length_int"}
"""Where a dynamic and a static sliding entry count the tokens that they have seen."""


class StandIn(CacheLayerMixin):
    """A cache entry in the place of the model's own, to which the rest of the model sees no difference.

    transformers makes the masks of all layers of a kind for the first of them, so an entry must report the sizes that
    the one in its place would.

    Attributes:
        replaced: the entry, still empty, that the model's cache had in its place.
    """

    def __init__(self, replaced: DynamicLayer | StaticLayer | None = None) -> None:
        super().__init__()
        self.replaced: Any = DynamicLayer() if replaced is None else replaced
        # Without a mask for a single query the other layers of a static cache would read keys that are not
        # written yet; transformers makes one only if every entry is of this kind.
        self.is_compileable: bool = self.replaced.is_compileable
        self.is_sliding: bool = self.replaced.is_sliding

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        entry = self.replaced
        if entry.is_sliding:
            setattr(entry, LENGTH_OF[isinstance(entry, StaticLayer)], self.get_seq_length())
        elif not isinstance(entry, StaticLayer):
            return self.get_seq_length() + query_length, 0
        return entry.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return self.replaced.get_max_length()


class WholeKeys(StandIn, DynamicLayer):
    """The keys and values of all tokens of a layer, in the place of an entry that drops old ones."""


class OwnState(StandIn):
    """Cache entry of one layer.

    Attributes:
        length: tokens seen, pads included (the host's count of positions).
        seen: int64 `batch` on the CPU, real tokens seen of each row; None before the first call.
        rows: the mechanism's own tensors by name, batch first.
    """

    def __init__(self, replaced: DynamicLayer | StaticLayer | None = None) -> None:
        super().__init__(replaced)
        self.reset()

    def reset(self) -> None:
        self.length = 0
        self.seen: Tensor | None = None
        self.rows: dict[str, Tensor] = {}
        self.is_initialized = False

    @torch.compiler.disable  # outside of any graph, whose next run would overwrite the rows
    def advance(self, new: Tensor, length: int, rows: dict[str, Tensor]) -> None:
        """Count `new` real tokens per row and `length` positions, and keep the rows for the next
        call."""
        self.seen = new if self.seen is None else self.seen + new
        self.length += length
        self.rows = {n: x.clone() for n, x in rows.items()} if self.is_compileable else rows
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.seen is not None:
            self.seen = self.seen[indices.cpu()]
            self.rows = {name: x[indices.to(x.device)] for name, x in self.rows.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen is not None:
            self.seen = self.seen.repeat_interleave(repeats)
            self.rows = {name: x.repeat_interleave(repeats, dim=0) for name, x in self.rows.items()}

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return not self.rows

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of a count.

        Raises:
            SurgeryError: there is a state, even if nothing is to be taken back this time: whoever guesses tokens
                ahead calls this after each guess, and will be wrong at some point.
        """
        if self.rows:
            raise SurgeryError(
                "a layer of this model keeps a state, and no token can be taken back out of a state: "
                "assisted decoding and prompt lookup guess tokens that they take back",
                hint="generate without assistant_model and prompt_lookup_num_tokens",
            )
        if self.seen is not None:  # `tokens_to_remove` is negative
            self.length += tokens_to_remove
            self.seen = self.seen + tokens_to_remove

    def offload(self) -> None:
        """Nothing: the state is small and stays on the device."""

    def prefetch(self) -> None:
        """Nothing: see `offload`."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("this state is written by its mechanism, not through `update`")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("this state is written by its mechanism, not through `update`")


Entry = TypeVar("Entry", bound=StandIn)


def entry(cache: Any, layer_idx: int, kind: type[Entry]) -> Entry:
    """The entry of layer `layer_idx` in a transformers cache, of this kind from the first call on.

    Raises:
        SurgeryError: an entry that another attention has already written.
    """
    layer = entry_of(cache, layer_idx)
    if isinstance(layer, kind):
        return layer
    if not isinstance(layer, (DynamicLayer, StaticLayer)) or layer.get_seq_length() > 0:
        raise SurgeryError(
            f"layer {layer_idx} of this cache ({type(layer).__name__}, {layer.get_seq_length()} "
            "tokens) was written by another attention",
            hint="a cache belongs to one model: start the student with an empty one",
        )
    cache.layers[layer_idx] = kind(layer)
    return cache.layers[layer_idx]


def count_tokens(cache: Any | None, layer_idx: int | None, x: Tensor) -> None:
    """Advance the entry of a mechanism without state by the tokens of `x`: positions are counted from
    layer 0's entry.

    Args:
        cache: of the running call; None = nothing to count.
        layer_idx: of the module; None = outside the blocks.
        x: `batch pos d`.
    """
    if cache is not None and layer_idx is not None:
        entry(cache, layer_idx, OwnState).advance(
            torch.full(x.shape[:1], x.shape[1]), x.shape[1], {}
        )
