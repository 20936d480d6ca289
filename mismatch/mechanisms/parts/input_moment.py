"""What a projection must be right on: the second moment of a module's inputs, for weights that are fitted without a
gradient.

    C = E[z z^T],  z = [x, 1]        then E[(W z)(W' z)^T] = W C W'^T for any two projections with their biases

Of all tokens, the first one and massive ones too: what is attended to most is among them. Without calibration text
(`init=weights`) C is the identity: a decomposition of the weights alone.

An error of a key counts by what queries make of it, one of a value by what the output projection makes of it:

    sum_h E (q_h . dk)^2 = dk^T M dk,  M = sum_h W_q C W_q^T          sum_h |W_o dv|^2 = dv^T M dv,  M = sum_h W_o^T W_o

over the query heads h that read the kv head, each taken by itself. With the root of M in front, least squares count so.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mismatch.mechanisms.base import Context, need_calibration

FLOOR = 1e-6
"""Smallest eigenvalue of a metric, of the largest."""


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


def key_metric(q: Tensor, moments: Tensor, kv_heads: int) -> Tensor:
    """M of the keys of each kv head, `KV D D`; q: weights and biases of the queries, `H D d_model+1`."""
    return (q @ moments @ q.mT).unflatten(0, (kv_heads, -1)).sum(1)


def value_metric(output: Tensor, kv_heads: int) -> Tensor:
    """M of the values of each kv head, `KV D D`; output: the output projection, `out H D`."""
    by_head = torch.einsum("ohd,ohe->hde", output, output)
    return by_head.unflatten(0, (kv_heads, -1)).sum(1)


def root(metric: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of each M, and its inverse: `... D D`. What counts for almost nothing counts for FLOOR."""
    if not metric.numel():
        return metric, metric
    size, basis = torch.linalg.eigh(metric)
    size = size.clamp(min=FLOOR * float(size.max())).sqrt()
    return (basis * size[..., None, :]) @ basis.mT, (basis / size[..., None, :]) @ basis.mT
