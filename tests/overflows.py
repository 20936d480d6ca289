"""A mechanism whose numbers are not finite, for tests of what is said then."""

from __future__ import annotations

from mismatch import registry
from mismatch.mechanisms.base import Wrapper


class Overflows(Wrapper):
    """The original attention, infinite in layer 1."""

    Config = registry.mechanisms().get("zero").Config
    slots = ("attn",)
    identity = "none"
    state = "the original's"
    source = "a test"

    def forward(self, *args, **kwargs):
        out = self.original(*args, **kwargs)
        return (out[0] * float("inf"), *out[1:]) if self.context.layer == 1 else out
