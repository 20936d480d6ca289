"""Vectors in 8 bits: MXINT8 of the OCP Microscaling formats (arXiv 2310.10537), 32 numbers and one power of two.

    E = floor(log2 max |x|) of a block of 32, c = round(2^(6 - E) x) within -127 .. 127, x' = c 2^(E - 6)

Where a width is no multiple of 32, its last block is shorter. x' is of 7 bits and a power of two, so float32, float16
and bfloat16 have it exactly within their range, and x' read back is x' once more: a vector may be packed and unpacked
as often as one likes. The error of a number is at most 1/127 of the largest in its block.

A block with a number that is not finite is read as NaN, whole. Numbers below 2^-126 may become 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32
BITS = 6  # of a code behind its leading one
MOST = 127
LEAST = -120  # of an exponent: 2^(LEAST - BITS) is still a normal float32
BROKEN = -128
"""The exponent of a block that holds a number which is not finite."""


def bytes_of(width: int) -> int:
    """Bytes of one vector."""
    return width + -(-width // BLOCK)


def rounded(x: Tensor) -> Tensor:
    """What `unpacked(packed(x))` gives of `... D`, in float32 at least; its gradient goes straight through."""
    found: Tensor = _Rounded.apply(x)
    return found


def packed(x: Tensor) -> Tensor:
    """`... D` -> int8 `... bytes_of(D)`: the codes, then the exponents of the blocks."""
    codes, exponent = _coded(x)
    codes = codes.nan_to_num().flatten(-2)[..., : x.shape[-1]]
    return torch.cat([codes.to(torch.int8), exponent.to(torch.int8)], dim=-1)


def unpacked(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """int8 `... bytes_of(width)` -> `... width`."""
    codes, exponent = x[..., :width].to(dtype), x[..., width:]
    return _decoded(_blocks(codes), exponent.int(), width)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kind = x.dtype
        return _decoded(*_coded(x), x.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].to(ctx.kind)


def _blocks(x: Tensor) -> Tensor:
    """`... D` -> `... blocks 32`, zeros behind the last."""
    return F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def _coded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as whole numbers of a float dtype, `... blocks 32`, and exponents, int32 `... blocks`."""
    blocks = _blocks(x.to(torch.promote_types(x.dtype, torch.float32)))
    largest = blocks.abs().amax(-1)
    exponent = (torch.frexp(largest.nan_to_num()).exponent - 1).clamp(LEAST, MOST)
    codes = torch.ldexp(blocks, (BITS - exponent)[..., None]).round().clamp(-MOST, MOST)
    return codes, exponent.masked_fill(~largest.isfinite(), BROKEN)


def _decoded(codes: Tensor, exponent: Tensor, width: int) -> Tensor:
    scale = torch.ldexp(torch.ones_like(exponent, dtype=codes.dtype), exponent - BITS)
    scale = scale.masked_fill(exponent == BROKEN, torch.nan)
    return (codes * scale[..., None]).flatten(-2)[..., :width]
