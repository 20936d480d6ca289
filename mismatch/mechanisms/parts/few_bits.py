"""Linear layers whose weights are kept in 4 bits, by the arithmetic of bitsandbytes, or in 8, in its format.

    4 bits   W4 = NF4(W): blocks of 64 values, one of 16 levels each, times the block's largest magnitude
    8 bits   W8 = round(127 W / s) s / 127, s the largest magnitude of the row

The codes and their scales are buffers, made once and never trained, so a checkpoint is an ordinary one; the layer that
they are made of stays as it is. Float32 numbers are kept as their bits in int32: a model that is cast to bfloat16 must
not round them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.parts.linears import LinearLayer, matrix
from mismatch.models.quantised import LEVELS_8BIT

BLOCK = 64  # values that share a scale
SCALES = 256  # scales that share a scale of their own, with double quantisation
SMALLEST = torch.finfo(torch.float32).tiny  # of a row's largest magnitude, not to divide by 0
BITS = torch.int32  # what float32 numbers are kept as


class NF4Linear(nn.Linear):
    """A linear layer whose weight is kept in NF4. `weight` is the dequantised matrix, made anew.

    Buffers: `packed` two values a byte; `absmax` the scales of the blocks. With double
    quantisation `absmax` is 8-bit, and `scale` and `offset` bring it back.

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
        flat = bitsandbytes().functional.dequantize_4bit(self.packed, self._state(flat=True))
        return flat.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_features % BLOCK:  # see `_state`
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        # The bias is added here: bitsandbytes sums its gradient over the first dimension only.
        y = bitsandbytes().matmul_4bit(x, self.packed, quant_state=self._state())
        return y if self.bias is None else y + self.bias

    def _state(self, flat: bool = False) -> Any:
        """The buffers as bitsandbytes' own state object.

        flat: as one row. On a CPU bitsandbytes 0.50 takes the scales of other blocks where a block spans rows (their
        length is a multiple of 16, and none of 64).
        """
        functional = bitsandbytes().functional
        levels, dynamic = _codes(self.packed.device)
        double = hasattr(self, "scale")
        size = self.out_features * self.in_features
        state = {
            "absmax": self.absmax if double else self.absmax.view(torch.float32),
            "shape": torch.Size((1, size) if flat else (self.out_features, self.in_features)),
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


class Int8Linear(nn.Linear):
    """A linear layer whose weight is kept in 8 bits, a scale for each row. `weight` is made anew at each look.

    Unlike bitsandbytes' own layer it rounds no activations. Buffers: `codes` `out in`; `scale` `out`.

    Args:
        layer: the linear layer; its bias is shared.
        empty: zeros are enough, the tensors are read from a checkpoint.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, layer: LinearLayer, empty: bool = False) -> None:
        nn.Module.__init__(self)
        full = matrix(layer)
        self.out_features, self.in_features = full.shape
        self.dtype = full.dtype
        self.bias = layer.bias
        codes = torch.zeros(full.shape, dtype=torch.int8, device=full.device)
        scale = torch.zeros(len(full), dtype=torch.float32, device=full.device)
        if not (full.is_meta or empty):
            # bitsandbytes' own call takes float16 alone on a GPU.
            scale = full.abs().amax(1).float()
            steps = full.float() * (LEVELS_8BIT / scale.clamp(min=SMALLEST))[:, None]
            codes = steps.round().to(torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.view(BITS))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # made anew at each look, never set
        scale = self.scale.view(torch.float32)[:, None] / LEVELS_8BIT
        return (self.codes * scale).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


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


def bitsandbytes(who: str = "") -> Any:
    """The library, imported when first needed.

    Args:
        who: where, and the mechanism that needs it, for the error.

    Raises:
        SurgeryError: it is not installed; names the extra.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise SurgeryError(
            f"{who} needs bitsandbytes, which cannot be imported: {error}",
            hint="pip install 'llm-mismatch[qlora]'",
        ) from error
    return bitsandbytes
