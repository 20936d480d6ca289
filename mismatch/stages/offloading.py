"""Stages that cannot work with weights that accelerate keeps in host memory or on disk."""

from __future__ import annotations

from typing import Any

from mismatch.errors import UsageError
from mismatch.models.offloaded import offloaded
from mismatch.models.target import to_disk
from mismatch.stages.opening import Opened


def refuse_offloaded(opened: Opened[Any], why: str) -> None:
    """Refuse weights that are not where they are computed with: before they are loaded where a map says so, behind it
    where `auto` did so.

    Args:
        opened: the command.
        why: they must be there.

    Raises:
        UsageError: they are not.
    """
    names = [name for model in opened.models for name in offloaded(model)]
    names = names or to_disk(opened.config.device_map)
    if names:
        raise UsageError(
            f"{names[0]} is offloaded ({len(names)} parts of the model are), and {why}",
            hint="keep the whole model on devices: --dtype bfloat16, or a --device-map without cpu and disk",
        )
