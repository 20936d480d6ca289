"""How transformers calls a module of a block, and what it returns (transformers 5.2x).

| module | called with | returns |
|---|---|---|
| attention | keywords `hidden_states attention_mask position_ids past_key_values` ... | 2-tuple |
| attention, gpt2 and gpt_neox | `hidden_states` positional; gpt_neox: `layer_past` | 2-tuple |
| linear attention of qwen3_5 | `hidden_states cache_params attention_mask` | Tensor |
| block | `hidden_states` positional, the rest as for attention | Tensor |
| block, gpt2 | the cache positional too | Tensor |
| mlp, norms, projections | one Tensor, positional | Tensor |
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

CACHE_NAMES = ("past_key_values", "layer_past", "cache_params")


def hidden_in(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The stream that goes into a module, `batch pos d`: the first positional argument or
    `hidden_states`."""
    return args[0] if args else kwargs["hidden_states"]


def cache_in(kwargs: dict[str, Any], args: tuple = ()) -> Any | None:
    """The KV cache of this call, or None. Only a block can find it among `args`."""
    for name in CACHE_NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return next((value for value in args if isinstance(value, Cache)), None)


def with_cache(args: tuple, kwargs: dict[str, Any], cache: Any) -> tuple[tuple, dict[str, Any]]:
    """The same call with another cache."""
    given = tuple(cache if isinstance(value, Cache) else value for value in args)
    named = {
        name: cache if name in CACHE_NAMES and value is not None else value
        for name, value in kwargs.items()
    }
    return given, named


def entry_of(cache: Any, layer_idx: int) -> Any:
    """The entry of a layer in a cache, made now where the cache makes them as they are needed."""
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[layer_idx]


def with_entry(cache: Any, layer_idx: int, entry: Any) -> Any:
    """The same cache with another entry for a layer; the one given keeps its own."""
    view = copy.copy(cache)
    view.layers = [*cache.layers]
    view.layers[layer_idx] = entry
    return view


def first_of(output: Any) -> Tensor:
    """The stream that a module returns, `batch pos d`."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, new: Tensor) -> Any:
    """The same structure with another stream in it."""
    return (new, *output[1:]) if isinstance(output, tuple) else new
