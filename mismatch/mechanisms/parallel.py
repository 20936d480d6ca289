"""parallel: the module stays, and another mechanism is added beside it, scaled by one number.

    y = original(x) + alpha * inner(x)

`layer12:parallel(infini, alpha=0)` starts as the teacher, to the bit, and training sets how much of
the new mechanism is used. `inner` is built from the same original and inherits its tensors: both paths
then share the projections, and training one trains the other (freeze them to train the new tensors
alone). Each path keeps its own state: the cache entry of the layer becomes a pair. Inherited: the
original, and what `inner` inherits. New: alpha, and what is new in `inner`. Dropped: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context, Wrapper, refuse_linear_attention, tensor_kind
from mismatch.mechanisms.parts.calling import first_of, with_first
from mismatch.mechanisms.parts.side_by_side import side_by_side

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
    heads = True
    identity = "alpha = 0"
    state = "the original's and the inner mechanism's, side by side"
    source = "parallel branch with a learnable scale, as ReZero (arXiv 2003.04887) adds one"
    stacks = True

    def __init__(self, original: nn.Module, config: ParallelConfig, context: Context) -> None:
        """Raises:
        SurgeryError: built outside surgery, which is what builds `inner`.
        """
        super().__init__(original, config, context)
        refuse_linear_attention(
            original, context, ", and its state in the cache has no second one beside it"
        )
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
        paths = (self.original, self.inner)
        output, inner = side_by_side(paths, self.context.layer, args, kwargs, "`parallel`")
        return with_first(output, first_of(output) + self.alpha * first_of(inner))
