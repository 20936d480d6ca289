"""identity: the module itself, called through a wrapper. The control that must read exactly 0.

    y = original(x)

If any number of a trace with `identity` is not its null value, then the plumbing changes the model,
not the mechanism. Inherited: everything. New, dropped: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mismatch.mechanisms.base import Wrapper


@dataclass(frozen=True)
class IdentityConfig:
    """No options."""


class Identity(Wrapper):
    """Calls the original."""

    Config = IdentityConfig
    slots = (
        "attn", "mlp", "block", "norm1", "norm2", "norms", "rope", "final_norm",
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    heads = True
    identity = "always"
    state = "the original's"
    source = "control"
    stacks = True
    merges = True

    def merged(self) -> nn.Module:
        return self.original
