"""The channels of a head as complex numbers, where the rotary embedding turns them two by two.

    z_i = x_i + j x_{i + W/2},  i < W/2       a position turns z_i by exp(j p f_i)      W: rotated channels, the first

A linear map across heads passes through the rotation where it is one complex factor in each pair: it turns and
stretches z_i and mixes it with no other pair. Channels from W on are not rotated, and free.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mismatch.mechanisms.parts.projections import AttentionParts
from mismatch.mechanisms.parts.rotary import own_parameters


def rotary_width(parts: AttentionParts) -> int:
    """W of an attention; 0 where positions do not enter by rotation.

    Raises:
        SurgeryError: the model names no rotary parameters.
    """
    if not parts.rotates:
        return 0
    config = parts.context.model_config
    own = own_parameters(config, parts.context.layer)
    head = getattr(config, "head_dim", None) or parts.head_dim  # as transformers counts
    return 2 * math.ceil(int(head * own.get("partial_rotary_factor", 1.0)) / 2)


def pair_gram(gram: Tensor, width: int) -> Tensor:
    """E[z_h conj(z_h')] of each pair.

    Args:
        gram: E[x_h x_h'], `heads D heads D`.
        width: W.

    Returns:
        complex, `W/2 heads heads`.
    """
    half = width // 2
    i = torch.arange(half, device=gram.device)
    real = gram[:, i, :, i] + gram[:, i + half, :, i + half]
    imag = gram[:, i + half, :, i] - gram[:, i, :, i + half]
    return torch.complex(real, imag)


def real_maps(factors: Tensor, free: Tensor) -> Tensor:
    """A map of a head for each factor: `heads D D`.

    Args:
        factors: of the pairs, complex `heads W/2`.
        free: of the channels that are not rotated, `heads D-W D-W`.
    """
    heads, half = factors.shape
    size = 2 * half + free.shape[-1]
    maps = free.new_zeros(heads, size, size)
    i = torch.arange(half, device=free.device)
    maps[:, i, i] = maps[:, i + half, i + half] = factors.real
    maps[:, i + half, i] = factors.imag
    maps[:, i, i + half] = -factors.imag
    maps[:, 2 * half :, 2 * half :] = free
    return maps
