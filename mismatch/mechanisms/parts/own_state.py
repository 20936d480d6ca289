"""The cache entry of a mechanism that keeps its own state: a recurrent matrix, a memory, an open segment.

What `generate()` does to a cache (reorder beams, repeat, select, reset) is done here to every row
of the state. It reports the true number of tokens, because transformers takes positions and mask
sizes from layer 0's entry. A mechanism writes `rows` and calls `advance`; nothing goes through
transformers' `update`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from mismatch.errors import SurgeryError


class OwnState(CacheLayerMixin):
    """Cache entry of one layer.

    Attributes:
        length: tokens seen, pads included (the host's count of positions).
        seen: int64 `batch` on the CPU, real tokens seen of each row; None before the first call.
        rows: the mechanism's own tensors by name, batch first.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.length = 0
        self.seen: Tensor | None = None
        self.rows: dict[str, Tensor] = {}
        self.is_initialized = False

    def advance(self, new: Tensor, length: int, rows: dict[str, Tensor]) -> None:
        """Count `new` real tokens per row and `length` positions, and keep the rows for the next
        call."""
        self.seen = new if self.seen is None else self.seen + new
        self.length += length
        self.rows = rows
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

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

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise SurgeryError(
                "this cache cannot be cropped: a token cannot be removed from a state",
                hint="generate without assisted decoding, prompt lookup or contrastive search",
            )

    def offload(self) -> None:
        """Nothing: the state is small and stays on the device."""

    def prefetch(self) -> None:
        """Nothing: see `offload`."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("this state is written by its mechanism, not through `update`")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("this state is written by its mechanism, not through `update`")


def entry(cache: Any, layer_idx: int) -> OwnState:
    """The state of layer `layer_idx` in a transformers cache, put there on the first call.

    Raises:
        SurgeryError: a static cache, or an entry that another attention has already written.
    """
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, OwnState):
        return layer
    if isinstance(layer, StaticLayer):
        raise SurgeryError(
            f"layer {layer_idx} keeps its own state and does not fit into a static cache",
            hint="generate with the default dynamic cache (no cache_implementation='static')",
        )
    if not isinstance(layer, DynamicLayer) or layer.get_seq_length() > 0:
        raise SurgeryError(
            f"layer {layer_idx} of this cache ({type(layer).__name__}, {layer.get_seq_length()} "
            "tokens) was written by another attention",
            hint="a cache belongs to one model: start the student with an empty one",
        )
    cache.layers[layer_idx] = OwnState()
    return cache.layers[layer_idx]


def count_tokens(cache: Any | None, layer_idx: int | None, x: Tensor, keep: Tensor | None) -> None:
    """Advance the entry of a mechanism without state by the tokens of `x`: positions are counted from
    layer 0's entry.

    Args:
        cache: of the running call; None = nothing to count.
        layer_idx: of the module; None = outside the blocks.
        x: `batch pos d`.
        keep: bool `batch pos`, True = real token; None = every token is.
    """
    if cache is None or layer_idx is None:
        return
    real = torch.full(x.shape[:1], x.shape[1]) if keep is None else keep.sum(1).cpu()
    entry(cache, layer_idx).advance(real, x.shape[1], {})
