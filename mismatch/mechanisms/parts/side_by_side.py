"""Several modules in the place of one, each with its own entry of the cache.

Each runs on a view of the cache in which the entry of the layer is its own; what it leaves there is kept for the next
call. To the model the entry is that of the first. The others start from an empty entry of the same kind and size,
which is what masks are made for.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from mismatch.errors import SurgeryError
from mismatch.mechanisms.parts.calling import cache_in, entry_of, with_cache, with_entry


def side_by_side(
    paths: Sequence[nn.Module],
    layer: int | None,
    args: tuple,
    kwargs: dict[str, Any],
    owner: str,
    first: Callable[[Any], Any] = lambda entry: entry,
) -> list[Any]:
    """The output of each path for the same call.

    Args:
        paths: at least one.
        layer: of the module; None = outside the blocks, where nothing is cached.
        args, kwargs: of the call.
        owner: the mechanism, for the error.
        first: makes the entry of the first path from the empty one that is there.

    Raises:
        SurgeryError: the cache was written by another model.
    """
    if not torch.compiler.is_compiling():
        _warn_of_adapters(paths, layer, owner)
    cache = cache_in(kwargs, args)
    if cache is None or layer is None or len(paths) == 1:
        return [path(*args, **kwargs) for path in paths]
    entries = _entries(cache, layer, len(paths), owner, first)
    return [
        _with_state(path, cache, layer, entries, at, args, kwargs) for at, path in enumerate(paths)
    ]


def _warn_of_adapters(paths: Sequence[nn.Module], layer: int | None, owner: str) -> None:
    """peft merges an adapter into a weight in place, whoever else reads it."""
    for path in paths:
        for name, child in path._modules.items():
            adapted = getattr(child, "base_layer", None)  # what a layer of peft wraps
            if adapted is None or type(child).__module__.startswith("mismatch."):
                continue  # `mismatch merge` refuses where its own could not be merged
            others = (other._modules.get(name) for other in paths if other is not path)
            if any(
                getattr(getattr(o, "base_layer", o), "weight", None) is adapted.weight
                for o in others
            ):
                warnings.warn(
                    f"layer {layer}: a peft adapter sits on `{name}`, whose weight several paths of {owner} read. The "
                    "model is right as it stands; merge_and_unload() would write the adapter into all of them. Keep it "
                    "unmerged, or swap mismatch's own `lora` in",
                    stacklevel=2,
                )
                return


@torch.compiler.disable  # what a path keeps between two calls does not fit into one graph
def _with_state(
    path: nn.Module,
    cache: Any,
    layer: int,
    entries: Entries,
    at: int,
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Run one path on a view of the cache in which this layer's entry is its own."""
    view = with_entry(cache, layer, entries.each[at])
    given, named = with_cache(args, kwargs, view)
    output = path(*given, **named)
    entries.each[at] = view.layers[layer]  # a path may have replaced it by an entry of its own kind
    return output


class Entries(CacheLayerMixin):
    """Cache entry of several paths, in their order. To the model it is that of the first."""

    def __init__(self, each: Sequence[Any]) -> None:
        self.each = list(each)

    def __getattr__(self, name: str) -> Any:
        if name == "each":
            raise AttributeError(name)
        return getattr(self.each[0], name)

    @property
    def is_sliding(self) -> bool:
        return getattr(self.each[0], "is_sliding", False)

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        # transformers leaves out the mask of a single query unless every entry is. The keys of a static
        # entry that are not written yet would then be read, in this layer and in all others.
        return self.each[0].is_compileable

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]  # the first may be exchanged
        return all(entry.is_croppable for entry in self.each)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.each[0].lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.each[0].update(key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.each[0].get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.each[0].get_seq_length()

    def get_max_length(self) -> int:
        return self.each[0].get_max_length()

    def _all(self, method: str, *args: Any) -> None:
        for entry in self.each:
            getattr(entry, method)(*args)

    def reset(self) -> None:
        self._all("reset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._all("reorder_cache", beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._all("batch_select_indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._all("batch_repeat_interleave", repeats)

    def crop(self, tokens_to_remove: int) -> None:
        self._all("crop", tokens_to_remove)

    def activate_past_recording(self) -> None:
        for entry in self.each:
            if hasattr(entry, "activate_past_recording"):
                entry.activate_past_recording()

    def offload(self) -> None:
        self._all("offload")

    def prefetch(self) -> None:
        self._all("prefetch")


class SomeKVHeads:
    """A cache entry that keeps some kv heads only; the others are given back as zeros, for heads that no one reads."""

    def __init__(self, entry: Any, heads: Sequence[int]) -> None:
        self.entry, self.heads = entry, list(heads)

    def __getattr__(self, name: str) -> Any:
        if name in ("entry", "heads"):
            raise AttributeError(name)
        return getattr(self.entry, name)

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As that of the entry: `batch KV new D` each in, `batch KV keys D` each out."""
        held = self.entry.update(k[:, self.heads], v[:, self.heads], *args, **kwargs)
        return self._wide(held[0], k.shape[1]), self._wide(held[1], k.shape[1])

    def _wide(self, held: Tensor, heads: int) -> Tensor:
        wide = held.new_zeros(held.shape[0], heads, *held.shape[2:])
        wide[:, self.heads] = held
        return wide


def flat(entry: Any) -> list[Any]:
    """The entry of each path, those of paths inside a path too."""
    if not isinstance(entry, Entries):
        return [entry]
    return [one for own in entry.each for one in flat(own)]


def _entries(
    cache: Any, layer: int, count: int, owner: str, first: Callable[[Any], Any]
) -> Entries:
    """The entries of this layer in the cache, made on the first call.

    Raises:
        SurgeryError: the entry was written before there were several.
    """
    found = entry_of(cache, layer)
    if isinstance(found, Entries):
        return found
    if found.get_seq_length() > 0:
        raise SurgeryError(
            f"layer {layer} of this cache ({type(found).__name__}) was written by a model without "
            f"{owner}",
            hint="a cache belongs to one model: start the student with an empty one",
        )
    others = [copy.deepcopy(found) for _ in range(count - 1)]
    cache.layers[layer] = Entries([first(found), *others])
    return cache.layers[layer]
