"""parallel: the module stays, and another mechanism is added beside it, scaled by one number.

    y = original(x) + alpha * inner(x)

`layer12:parallel(infini, alpha=0)` starts as the teacher, to the bit, and training sets how much of
the new mechanism is used. `inner` is built from the same original and inherits its tensors: both paths
then share the projections, and training one trains the other (freeze them to train the new tensors
alone). Each path keeps its own state: the cache entry of the layer becomes a pair. Inherited: the
original, and what `inner` inherits. New: alpha, and what is new in `inner`. Dropped: nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context, Wrapper, tensor_kind
from mismatch.mechanisms.parts.calling import (
    cache_in,
    entry_of,
    first_of,
    with_cache,
    with_entry,
    with_first,
)

if TYPE_CHECKING:
    from mismatch.spec import Call


@dataclass(frozen=True)
class ParallelConfig:
    inner: Call
    """The mechanism beside the original."""
    alpha: float = 0.0
    """Its weight before training."""


class Parallel(Wrapper):
    """The original plus alpha times another mechanism."""

    Config = ParallelConfig
    slots = ("attn", "mlp", "block", "norm1", "norm2", "norms", "rope", "final_norm")
    identity = "alpha = 0"
    state = "the original's and the inner mechanism's, side by side"
    source = "parallel branch with a learnable scale, as ReZero (arXiv 2003.04887) adds one"
    stacks = True

    def __init__(self, original: nn.Module, config: ParallelConfig, context: Context) -> None:
        """Raises:
        SurgeryError: built outside surgery, which is what builds `inner`.
        """
        super().__init__(original, config, context)
        if context.build is None:
            raise SurgeryError(
                f"`parallel` at {context.where} nests `{config.inner}`, and nothing can build it",
                hint="build it through mismatch.swap",
            )
        self.inner = context.build(config.inner, original)
        self.alpha = nn.Parameter(torch.tensor(config.alpha, **tensor_kind(original, context)))

    def notes(self) -> tuple[str, ...]:
        return self.inner.notes()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache, layer = cache_in(kwargs, args), self.context.layer
        if cache is None or layer is None:
            output, inner = self.original(*args, **kwargs), self.inner(*args, **kwargs)
        else:
            pair = _pair(cache, layer)
            output = _with_state(self.original, cache, layer, pair, "outer", args, kwargs)
            inner = _with_state(self.inner, cache, layer, pair, "inner", args, kwargs)
        return with_first(output, first_of(output) + self.alpha * first_of(inner))


@torch.compiler.disable  # what a path keeps between two calls does not fit into one graph
def _with_state(
    path: nn.Module, cache: Any, layer: int, pair: PairLayer, side: str, args: tuple, kwargs: dict
) -> Any:
    """Run one path on a view of the cache in which this layer's entry is its own side of the
    pair."""
    view = with_entry(cache, layer, getattr(pair, side))
    given, named = with_cache(args, kwargs, view)
    output = path(*given, **named)
    setattr(
        pair, side, view.layers[layer]
    )  # a path may have replaced it by an entry of its own kind
    return output


class PairLayer(CacheLayerMixin):
    """Cache entry of two paths. To the model it is the original's entry, `outer`; the second is
    `inner`."""

    def __init__(self, outer: CacheLayerMixin, inner: CacheLayerMixin) -> None:
        self.outer = outer
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name in ("outer", "inner"):
            raise AttributeError(name)
        return getattr(self.outer, name)

    @property
    def is_sliding(self) -> bool:
        return getattr(self.outer, "is_sliding", False)

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        # transformers leaves out the mask of a single query unless every entry is. The keys of a static
        # entry that are not written yet would then be read, in this layer and in all others.
        return self.outer.is_compileable

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]  # `outer` may be exchanged
        return self.outer.is_croppable and self.inner.is_croppable

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.outer.lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.outer.update(key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.outer.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.outer.get_seq_length()

    def get_max_length(self) -> int:
        return self.outer.get_max_length()

    def _both(self, method: str, *args: Any) -> None:
        for path in (self.outer, self.inner):
            getattr(path, method)(*args)

    def reset(self) -> None:
        self._both("reset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._both("reorder_cache", beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._both("batch_select_indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._both("batch_repeat_interleave", repeats)

    def crop(self, tokens_to_remove: int) -> None:
        self._both("crop", tokens_to_remove)

    def activate_past_recording(self) -> None:
        for path in (self.outer, self.inner):
            if hasattr(path, "activate_past_recording"):
                path.activate_past_recording()

    def offload(self) -> None:
        self._both("offload")

    def prefetch(self) -> None:
        self._both("prefetch")


def _pair(cache: Any, layer: int) -> PairLayer:
    """The pair of this layer in the cache, made on the first call.

    Raises:
        SurgeryError: the entry was written before there was a pair.
    """
    found = entry_of(cache, layer)
    if isinstance(found, PairLayer):
        return found
    if found.get_seq_length() > 0:
        raise SurgeryError(
            f"layer {layer} of this cache ({type(found).__name__}) was written by a model without "
            "`parallel`",
            hint="a cache belongs to one model: start the student with an empty one",
        )
    # The inner path starts from an entry of the same kind and size, which is what masks are made for.
    cache.layers[layer] = PairLayer(found, copy.deepcopy(found))
    return cache.layers[layer]
