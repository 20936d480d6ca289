"""zero: the module runs, and its output is replaced by zeros. The control "simply delete it".

    y = 0

On `attn` and `mlp` nothing is added to the stream; on a norm the module behind it gets zeros; on
`block` the whole stream becomes zero (use `skip` to leave a block out). The original still runs:
shapes, cache and positions stay right, so only the values are ablated. Inherited: everything,
unused. New, dropped: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mismatch.mechanisms.base import Wrapper
from mismatch.mechanisms.parts.calling import first_of, with_first


@dataclass(frozen=True)
class ZeroConfig:
    """No options."""


class Zero(Wrapper):
    """Zeros of the shape, dtype and device of the original's output."""

    Config = ZeroConfig
    slots = (
        "attn", "mlp", "block", "norm1", "norm2", "norms", "rope", "final_norm",
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    heads = True
    identity = "none: no module computes zeros"
    state = "the original's"
    source = "control (zero ablation)"
    stacks = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.original(*args, **kwargs)
        return with_first(output, torch.zeros_like(first_of(output)))
