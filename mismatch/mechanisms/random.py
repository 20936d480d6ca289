"""random: the module with every weight redrawn. The control "right shape and scale, nothing learned".

    w' ~ N(mean(w), std(w)),   per tensor of the original, independent entries

Redrawn with the original's own mean and standard deviation (not an initialiser's), so that what
differs is what was learned and not the scale. A quantised matrix is redrawn as a full one. Draws
depend on the seed, the slot and the tensor's name only. Inherited: the code and the buffers. New:
every parameter. Dropped: the original's parameters.
"""

from __future__ import annotations

import copy
import zlib
from dataclasses import dataclass

import torch
from torch import nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context, Wrapper, tensor_kind
from mismatch.models import quantised


@dataclass(frozen=True)
class RandomConfig:
    seed: int = 0
    """Another seed, another draw."""


class Random(Wrapper):
    """A redrawn copy; `.original` is that copy, the module it was drawn after is not kept."""

    Config = RandomConfig
    slots = (
        "attn", "mlp", "block", "norm1", "norm2", "norms", "rope", "final_norm",
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    heads = True
    identity = "none: the learned weights are gone"
    state = "as the original's"
    source = "control (random weights)"
    merges = True

    def __init__(self, original: nn.Module, config: RandomConfig, context: Context) -> None:
        super().__init__(
            redraw(original, context, f"{context.seed}/{config.seed}/{context.where}"),
            config,
            context,
        )

    def merged(self) -> nn.Module:
        return self.original


def redraw(original: nn.Module, context: Context, key: str) -> nn.Module:
    """A copy of `original` with every parameter drawn anew; `key` seeds the draws.

    A quantised layer becomes an ordinary one, whose draws have mean and deviation of its numbers.
    """
    fresh = quantised.unpacked(copy.deepcopy(original), tensor_kind(original, context)["dtype"])
    with torch.no_grad():
        for name, weight in fresh.named_parameters():
            if weight.device.type == "meta":
                continue
            if not weight.is_floating_point():
                raise SurgeryError(
                    f"{context.where}: `random` cannot redraw `{name}`, which holds {weight.dtype} and no numbers",
                    hint="load the model without quantisation, or leave this control out",
                )
            # Drawn on the CPU in float32, so that a GPU or bfloat16 run gets the same control.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{key}/{name}".encode()))
            draw = torch.randn(weight.shape, generator=generator)
            mean, std = weight.double().mean().item(), weight.double().std(correction=0).item()
            weight.copy_(draw * std + mean)
    return fresh
