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

import functools
import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context
from mismatch.mechanisms.parts.linears import LinearLayer, dense, matrix
from mismatch.mechanisms.parts.lora_layers import LowRankAdapted

BLOCK = 64  # values that share a scale
SCALES = 256  # scales that share a scale of their own, with double quantisation
BITS = torch.int32  # what float32 numbers are kept as


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
        bitsandbytes(context.where)
        super().__init__(original, config, context)

    def adapted(self, layer: LinearLayer, path: str) -> nn.Module:
        empty = self.context.restoring
        return self.with_lora(
            NF4Linear(dense(layer, self.context), self.settings.double, empty), path
        )


class NF4Linear(nn.Linear):
    """A linear layer whose weight is kept in NF4. `weight` is the dequantised matrix, made anew.

    Buffers: `packed` two values a byte; `absmax` the scales of the blocks. With double
    quantisation `absmax` is 8-bit, and `scale` and `offset` bring it back. Float32 numbers are kept
    as their bits in int32: a model that is cast to bfloat16 must not round them.

    Args:
        layer: the linear layer; its bias is shared.
        double: keep the scales in 8 bits.
        empty: zeros are enough, the tensors are read from a checkpoint.
    """

    packed: Tensor
    absmax: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, layer: LinearLayer, double: bool, empty: bool = False) -> None:
        nn.Module.__init__(self)
        full = matrix(layer)
        self.out_features, self.in_features = full.shape
        self.dtype = full.dtype
        self.bias = layer.bias
        tensors = _empty(full, double) if full.is_meta or empty else _quantised(full, double)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor if tensor.dtype == torch.uint8 else tensor.view(BITS))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # made anew at each look, never set
        return bitsandbytes().functional.dequantize_4bit(self.packed, self._state())

    def forward(self, x: Tensor) -> Tensor:
        # The bias is added here: bitsandbytes sums its gradient over the first dimension only.
        y = bitsandbytes().matmul_4bit(x, self.packed, quant_state=self._state())
        return y if self.bias is None else y + self.bias

    def _state(self) -> Any:
        """The buffers as bitsandbytes' own state object."""
        functional = bitsandbytes().functional
        levels, dynamic = _codes(self.packed.device)
        double = hasattr(self, "scale")
        state = {
            "absmax": self.absmax if double else self.absmax.view(torch.float32),
            "shape": torch.Size((self.out_features, self.in_features)),
            "dtype": self.dtype,
            "blocksize": BLOCK,
            "quant_type": "nf4",
            "code": levels,
        }
        if double:
            scales = functional.QuantState(
                absmax=self.scale.view(torch.float32),
                blocksize=SCALES,
                code=dynamic,
                dtype=torch.float32,
            )
            state |= {"offset": self.offset.view(torch.float32), "state2": scales}
        return functional.QuantState(**state)


def _quantised(full: Tensor, double: bool) -> dict[str, Tensor]:
    packed, state = bitsandbytes().functional.quantize_4bit(
        full.contiguous(), blocksize=BLOCK, compress_statistics=double, quant_type="nf4"
    )
    tensors = {"packed": packed, "absmax": state.absmax}
    return tensors | ({"scale": state.state2.absmax, "offset": state.offset} if double else {})


def _empty(full: Tensor, double: bool) -> dict[str, Tensor]:
    """Placeholders of the shapes that `_quantised` returns."""
    blocks = math.ceil(full.numel() / BLOCK)
    byte: dict[str, Any] = {"dtype": torch.uint8, "device": full.device}
    wide: dict[str, Any] = {"dtype": torch.float32, "device": full.device}
    tensors = {"packed": torch.zeros(math.ceil(full.numel() / 2), 1, **byte)}
    if not double:
        return tensors | {"absmax": torch.zeros(blocks, **wide)}
    scales = {
        "scale": torch.zeros(math.ceil(blocks / SCALES), **wide),
        "offset": torch.zeros((), **wide),
    }
    return tensors | {"absmax": torch.zeros(blocks, **byte)} | scales


@functools.cache
def _codes(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 levels of NF4 and the 256 of the scales: constants, so in no checkpoint."""
    functional = bitsandbytes().functional
    with torch.inference_mode(False):  # they outlive the call that makes them
        return functional.get_4bit_type("nf4", device), functional.create_dynamic_map().to(device)


def bitsandbytes(where: str = "") -> Any:
    """The library, imported when first needed.

    Raises:
        SurgeryError: it is not installed; names the extra.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise SurgeryError(
            f"{where}: `qlora` needs bitsandbytes, which cannot be imported: {error}",
            hint="pip install 'llm-mismatch[qlora]'",
        ) from error
    return bitsandbytes
