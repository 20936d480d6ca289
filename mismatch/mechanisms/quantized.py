"""quantized: the module with its matrices in 4 or 8 bits. Nothing else changes: what rounding alone costs.

    y = dequant(Q(W)) x + b
    format=nf4    blocks of 64 values, one of 16 levels each, times the block's largest magnitude     4.1 bits a value
    format=int8   rows of 127 steps to either side, up to the row's largest magnitude                 8 bits a value

Source: NF4 and double quantisation, Dettmers et al., arXiv 2305.14314, section 3; rows in 8 bits, LLM.int8,
arXiv 2208.07339, section 2, the weights alone: activations are not rounded, and outliers have no path of their own.
Both are the formats of transformers' bitsandbytes quantizer, in one module of a model that is not quantised otherwise.
`lora` on top of it is `qlora`. It saves memory of weights, not of the cache, and no time here: the matrix is made anew
at each call. Gradients pass to the input; the codes are not trained.

Inherited: biases, and matrices that are no target. New: codes and scales, as buffers. Dropped: the matrices. Needs the
extra `qlora`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from mismatch.mechanisms.base import Context, Wrapper
from mismatch.mechanisms.parts.few_bits import Int8Linear, NF4Linear, bitsandbytes
from mismatch.mechanisms.parts.linears import ALL, dense, grafted, put, targets


@dataclass(frozen=True)
class QuantizedConfig:
    format: Literal["nf4", "int8"] = "nf4"
    """How a matrix is kept."""
    targets: tuple[str, ...] | None = None
    """Linear layers by name; none = every one of the module."""
    double: bool = True
    """Of nf4: keep the scales of the blocks in 8 bits too."""


class Quantized(Wrapper):
    """The module with its linear layers in few bits."""

    Config = QuantizedConfig
    slots = ("attn", "mlp", "block")
    heads = True
    identity = "none: few bits round the weights"
    state = "the original's"
    source = "arXiv 2305.14314; arXiv 2208.07339; arithmetic: bitsandbytes"
    stacks = True

    def __init__(self, original: nn.Module, config: QuantizedConfig, context: Context) -> None:
        """Raises:
        SurgeryError: bitsandbytes is not installed; a target that this module lacks.
        """
        bitsandbytes(f"{context.where}: `quantized`")
        tree = grafted(original)
        super().__init__(tree, config, context)
        for path, layer in targets(tree, config.targets or (ALL,), context).items():
            full = dense(layer, context)
            if config.format == "int8":
                put(tree, path, Int8Linear(full, context.restoring))
            else:
                put(tree, path, NF4Linear(full, config.double, context.restoring))
