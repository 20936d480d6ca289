"""skip: the block's input goes straight through. The control "leave the whole layer out".

    y = x

The premise of a residual stream is that one layer is a small correction; `skip` measures how small.
The block still runs, for shapes and cache. Inherited: everything, unused. New, dropped: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mismatch.mechanisms.base import Wrapper
from mismatch.mechanisms.parts.calling import hidden_in, with_first


@dataclass(frozen=True)
class SkipConfig:
    """No options."""


class Skip(Wrapper):
    """The block's input as its output."""

    Config = SkipConfig
    slots = ("block",)
    identity = "none: only a block that computes nothing equals its input"
    state = "the original's"
    source = "control (layer skip)"
    stacks = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return with_first(self.original(*args, **kwargs), hidden_in(args, kwargs))
