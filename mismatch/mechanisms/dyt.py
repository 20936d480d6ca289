"""dyt: Dynamic Tanh in place of a norm.

    y = gamma * tanh(alpha x) + beta

Source: Zhu et al., arXiv 2503.10622 (eq. 4). alpha is one learnable number per norm, no statistic
of the token is taken. A norm divides each token by its own rms, so near 0 DyT equals it for tokens
whose rms is 1 / alpha; the paper's 0.5 is for a model trained from scratch. Here alpha = 1 / rms of
the norm's own input over bulk calibration tokens (real, not position 0, not massive). Measured on
SmolLM2-135M, layer 12, 3 x 512 tokens of Wikipedia, KL in nats by choice of alpha:

    alpha                        norm1   norm2
    1 / rms                      .0594   .0486
    mean of 1 / token rms        .0593   .0488
    1 / median token rms         .0594   .0486
    least squares to the norm    .0594   .0563
    2 / rms                      .0738   .1324
    1 / mean |x|                 .0754   .1327
    0.5 (the paper's)            .1079   .2801

Inherited (inherit=true): gamma, and a LayerNorm's beta; gemma stores gamma - 1 and is read so. New:
alpha (1 value), and with inherit=false gamma = 1, beta = 0. Dropped: eps, and the division. Massive
tokens (norms of thousands) saturate the tanh: that is the mechanism, not an accident of the swap.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context, Mechanism, need_calibration, tensor_kind

PLACEHOLDER = 0.5  # the paper's; used on the meta device, where nothing is computed
SLOPES = tuple(2.0 ** (k / 4) for k in range(-12, 9))
"""Tried by `refit`, times the present slope: 1/8 to 4 in steps of 2^(1/4)."""


@dataclass(frozen=True)
class DyTConfig:
    alpha: Annotated[float, "> 0"] | None = None
    """Slope at 0; none = measured on calibration text."""
    inherit: bool = True
    """Keep the norm's gamma and beta."""


class InputScale:
    """Running sum of squares of a norm's input over bulk tokens, float64."""

    def __init__(self) -> None:
        self.squares = 0.0
        self.count = 0

    def update(self, inputs: Tensor, outputs: Tensor, keep: Tensor) -> None:
        kept = inputs[keep].double()
        self.squares += kept.pow(2).sum().item()
        self.count += kept.numel()

    def alpha(self) -> float:
        """1 / rms of the input.

        Raises:
            SurgeryError: no token was seen, or every input was 0.
        """
        if self.squares == 0:
            raise SurgeryError(
                "the calibration text has no usable token", hint="give a longer text"
            )
        return (self.count / self.squares) ** 0.5


class DyT(Mechanism):
    """Dynamic Tanh with the norm's own gain and bias."""

    Config = DyTConfig
    slots = ("norm1", "norm2", "norms", "final_norm")
    identity = "none: a norm divides each token by its own rms, DyT divides all by one number"
    state = "none"
    source = "arXiv 2503.10622, eq. 4"

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, original: nn.Module, config: DyTConfig, context: Context) -> None:
        """Raises:
        SurgeryError: the original is not a norm with a gain, or alpha has to be measured and was
            not.
        """
        super().__init__(original, config, context)
        weight = getattr(original, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 1:
            raise SurgeryError(
                f"{context.where}: {type(original).__name__} is not a norm with a gain"
            )
        kind = tensor_kind(original, context)
        bias = getattr(original, "bias", None)
        self.offset = gain_offset(original)
        if not config.inherit:
            weight = nn.Parameter(torch.full_like(weight, 1.0 - self.offset))
            bias = None if bias is None else nn.Parameter(torch.zeros_like(bias))
        self.weight = weight
        self.register_parameter("bias", bias)
        alpha = config.alpha
        if alpha is None:
            measured = need_calibration(original, context, "dyt")
            alpha = PLACEHOLDER if measured is None else measured.alpha()
        self.alpha = nn.Parameter(torch.tensor(alpha, **kind))

    @classmethod
    def calibrator(cls, config: DyTConfig) -> InputScale | None:
        return InputScale() if config.alpha is None else None

    @torch.no_grad()
    def refit(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> str:
        """Set slope, gain and bias by least squares, without a gradient.

        For each slope of a grid, gain and bias of a channel are a linear regression of the norm's output on tanh(alpha
        x): five sums a channel, one pass. The slope with the smallest error over all channels is taken.

        Args:
            pairs: input and output of the norm, `batch pos d` each.

        Returns:
            The names of what was set, for the report.
        """
        d = len(self.weight)
        slopes = torch.tensor(SLOPES, dtype=torch.float64, device=self.weight.device)
        slopes = slopes * self.alpha.double()
        tt, ty, t = (slopes.new_zeros(len(slopes), d) for _ in range(3))
        y, yy = slopes.new_zeros(d), slopes.new_zeros(d)
        n = 0
        for inputs, outputs in pairs:
            x, out = inputs.flatten(0, -2).double(), outputs.flatten(0, -2).double()
            n += len(x)
            y += out.sum(0)
            yy += out.square().sum(0)
            for k, slope in enumerate(slopes):
                bent = torch.tanh(slope * x)
                tt[k] += bent.square().sum(0)
                ty[k] += (bent * out).sum(0)
                t[k] += bent.sum(0)
        if self.bias is None:
            gain = ty / tt.clamp(min=torch.finfo(tt.dtype).tiny)
            bias = torch.zeros_like(gain)
        else:
            gain = (ty - t * y / n) / (tt - t * t / n).clamp(min=torch.finfo(tt.dtype).tiny)
            bias = (y - gain * t) / n
        error = yy - 2 * gain * ty - 2 * bias * y + gain**2 * tt + 2 * gain * bias * t + n * bias**2
        best = int(error.sum(1).argmin())
        self.alpha.copy_(slopes[best])
        self.weight.copy_(gain[best] - self.offset)
        if self.bias is not None:
            self.bias.copy_(bias[best])
        return "slope and gain" if self.bias is None else "slope, gain and bias"

    def forward(self, x: Tensor) -> Tensor:
        """`... d` in and out; computed in float32 at least, as the norms are."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = torch.tanh(self.alpha.to(wide.dtype) * wide) * (
            self.offset + self.weight.to(wide.dtype)
        )
        y = y if self.bias is None else y + self.bias.to(wide.dtype)
        return y.to(x.dtype)


def gain_offset(norm: nn.Module) -> float:
    """The number that the norm adds to its weight: 1 in gemma, which stores gamma - 1, otherwise 0.

    Found from a fresh norm of the same class, whose gain is 1 by construction.

    Raises:
        SurgeryError: the class cannot be built from its width alone.
    """
    try:
        with torch.device("cpu"):
            fresh: Any = type(norm)(1)
    except TypeError as error:
        raise SurgeryError(f"{type(norm).__name__} is not a norm that is known: {error}") from error
    return 1.0 - fresh.weight.item()
