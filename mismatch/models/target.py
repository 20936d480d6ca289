"""Where the weights of a model go: a device, or accelerate's device map.

auto, balanced, balanced_low_0, sequential   spread over the accelerators; what does not fit into them stays in host
                                             memory, and then on disk
{"model.layers.0": "cpu", ...}               every part of the model by name: a device, its number, cpu or disk; as
                                             text (JSON) or a dict
cuda:1                                       all of it on one device
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from mismatch.errors import ModelError

SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
EXAMPLE = '{"model.embed_tokens": 0, "model.layers.0": "cpu", "model.layers.1": "disk", ...}'


def as_target(device: Any, device_map: Any) -> dict[str, Any]:
    """Where a model goes: `{"device": ...}` or `{"device_map": ...}`.

    Raises:
        ModelError: both are given, the device cannot be used, or the map is none.
    """
    if device_map is not None:
        if device is not None:
            raise ModelError("device and device_map exclude one another", hint="give one of them")
        return {"device_map": as_map(device_map)}
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"device {chosen!s} cannot be used: {reason:.300}") from error
    return {"device": torch.device(chosen)}


def as_map(given: Any) -> str | dict[str, Any]:
    """A device map as transformers takes it.

    Raises:
        ModelError: it is none.
    """
    found = given
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            found = json.loads(given)
        except ValueError as error:
            raise ModelError(
                f"the device map is not JSON: {error}", hint=f"write it as {EXAMPLE}"
            ) from error
    places = found.values() if isinstance(found, Mapping) else (found,)
    for place in places:
        if not _is_place(place, spread=not isinstance(found, Mapping)):
            raise ModelError(
                f"the device map names {place!r}, which is no device",
                hint=f"a device such as cpu or cuda:1, {', '.join(SPREAD)}, or every part by name: {EXAMPLE}",
            )
    return dict(found) if isinstance(found, Mapping) else found


def to_disk(device_map: Any) -> list[str]:
    """The parts of a model that a map puts on disk."""
    found = None if device_map is None else as_map(device_map)
    return [name for name, at in found.items() if at == "disk"] if isinstance(found, dict) else []


def _is_place(place: Any, *, spread: bool) -> bool:
    if isinstance(place, str) and place in (SPREAD if spread else ("disk",)):
        return True
    if isinstance(place, int):
        return not isinstance(place, bool) and place >= 0
    try:
        torch.device(place)
    except (RuntimeError, TypeError):
        return False
    return True
