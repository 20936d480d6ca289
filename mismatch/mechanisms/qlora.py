"""qlora: LoRA over matrices that are kept in 4 bits.

    y = dequant(W4) x + s B A x,   W4 = NF4(W): blocks of 64 values, one of 16 levels each, times the
                                   block's largest magnitude

Source: Dettmers et al., arXiv 2305.14314 (section 3: NF4, double quantisation). The 4-bit
arithmetic is bitsandbytes', the adapter peft's, as in `lora`. W4 and its scales are buffers, made
once and never trained, so a checkpoint is an ordinary one; the teacher's tensors are not touched.
Gradients go through W4 to the input, by dequantising again. The paged optimiser of the paper is a
matter of training and not here. Inherited: biases and every matrix that is no target. New: A, B
(with dora m), and W4, a quarter of bfloat16's bytes. Dropped: the targets' weights. Needs the extra
`qlora`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import nn

from mismatch.mechanisms.base import Context
from mismatch.mechanisms.parts.few_bits import NF4Linear, bitsandbytes
from mismatch.mechanisms.parts.linears import LinearLayer, dense
from mismatch.mechanisms.parts.lora_layers import LowRankAdapted


@dataclass(frozen=True)
class QLoRAConfig:
    r: Annotated[int, ">= 1"] = 8
    """Rank of the added matrix."""
    alpha: Annotated[float, "> 0"] = 16.0
    """Scale of the added matrix, divided by r (by its root with rslora)."""
    targets: tuple[str, ...] | None = None
    """Linear layers by name, `[all]` for every one; none = queries and values, in an MLP all."""
    dora: bool = False
    """Train the length of each output's weights apart from their direction."""
    rslora: bool = False
    """Divide alpha by the root of r, not by r."""
    double: bool = True
    """Keep the scales of the blocks in 8 bits too."""


class QLoRA(LowRankAdapted):
    """The module with its targets in NF4 and peft's LoRA layers around them."""

    Config = QLoRAConfig
    slots = ("attn", "mlp", "block")
    identity = "none: 4 bits round the weights"
    state = "the original's"
    source = "arXiv 2305.14314; layers: bitsandbytes, peft"
    stacks = True
    merges = True

    def __init__(self, original: nn.Module, config: QLoRAConfig, context: Context) -> None:
        """Raises:
        SurgeryError: bitsandbytes is not installed; else as `lora`.
        """
        bitsandbytes(f"{context.where}: `qlora`")
        super().__init__(original, config, context)

    def adapted(self, layer: LinearLayer, path: str) -> nn.Module:
        empty = self.context.restoring
        return self.with_lora(
            NF4Linear(dense(layer, self.context), self.settings.double, empty), path
        )
