"""What a projection must be right on: the second moment of a module's inputs, for weights that are fitted without a
gradient.

    C = E[z z^T],  z = [x, 1]        then E[(W z)(W' z)^T] = W C W'^T for any two projections with their biases

Of all tokens, the first one and massive ones too: what is attended to most is among them. Without calibration text
(`init=weights`) C is the identity: a decomposition of the weights alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mismatch.mechanisms.base import Context, need_calibration


class InputMoment:
    """A running C, float64."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.count = 0

    def update(self, inputs: Tensor, outputs: Tensor, keep: Tensor) -> None:
        """As `Calibrator.update`."""
        z = F.pad(inputs.flatten(0, -2).double(), (0, 1), value=1.0)
        new = (z.T @ z).cpu()
        self.sum = new if self.sum is None else self.sum + new
        self.count += len(z)

    def matrix(self) -> Tensor:
        """C, `d_model+1` squared."""
        assert self.sum is not None
        return self.sum / self.count


def moment(original: nn.Module, context: Context, name: str, init: str) -> Tensor | None:
    """C on the CPU; None where placeholders are enough: on the meta device, and before a checkpoint is read.

    Args:
        original: the module that is replaced.
        name: of the mechanism.
        init: `text` or `weights`.

    Raises:
        SurgeryError: `text`, and no calibration was run.
    """
    if context.restoring or any(p.is_meta for p in original.parameters()):
        return None
    if init == "weights":
        return torch.eye(context.d_model + 1, dtype=torch.float64)
    measured: Any = need_calibration(original, context, name)
    return measured.matrix()
