"""mean: the module's output becomes its mean over calibration text. The control "keep only the bias".

    y = m,   m = E[original(x)] over bulk tokens (real, not position 0, not massive)

Behind it the layers receive the mean they expect and no information; what `mean` still breaks is
what the module computes; what only `zero` breaks is a constant that a bias could carry. The same
vector goes to every position, position 0 included. The original still runs, for shapes and cache.
Inherited: everything, unused. New: the mean (d values, a buffer, not trained). Dropped: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context, Wrapper, need_calibration, tensor_kind
from mismatch.mechanisms.parts.calling import first_of, with_first


@dataclass(frozen=True)
class MeanConfig:
    """No options."""


class OutputMean:
    """Running sum of a module's outputs over bulk tokens, float64."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def update(self, inputs: Tensor, outputs: Tensor, keep: Tensor) -> None:
        kept = outputs[keep].double()
        total = kept.sum(0).cpu()
        self.total = total if self.total is None else self.total + total
        self.count += kept.shape[0]

    def mean(self) -> Tensor:
        """The mean, `d`, float64.

        Raises:
            SurgeryError: no token was seen.
        """
        if self.total is None or self.count == 0:
            raise SurgeryError(
                "the calibration text has no usable token", hint="give a longer text"
            )
        return self.total / self.count


class Mean(Wrapper):
    """The calibration mean at every position."""

    Config = MeanConfig
    slots = (
        "attn", "mlp", "block", "norm1", "norm2", "norms", "rope", "final_norm",
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    heads = True
    identity = "none: no module computes a constant"
    state = "the original's"
    source = "control (mean ablation)"
    stacks = True

    def __init__(self, original: nn.Module, config: MeanConfig, context: Context) -> None:
        super().__init__(original, config, context)
        measured = need_calibration(original, context, "mean")
        kind = tensor_kind(original, context)
        if measured is None:
            width = context.width or int(getattr(original, "out_features", context.d_model))
            mean = torch.zeros(width, **kind)
        else:
            mean = measured.mean().to(**kind)
        self.register_buffer("mean", mean)

    @classmethod
    def calibrator(cls, config: MeanConfig) -> OutputMean:
        return OutputMean()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.original(*args, **kwargs)
        first = first_of(output)
        return with_first(output, self.mean.to(first).expand_as(first))
