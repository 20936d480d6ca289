"""Corrections of an update that are fitted on calibration text, by weighed least squares.

With y the teacher's update, s the student's on the same input, and n the teacher's without rotary embedding, each fit
gives a map s -> y^ that is then applied to every token of other text:

    scale      y^ = a s                                   one number
    mean       y^ = s + b                                 a vector
    affine     y^ = a * s + b                             mean and scale of every channel
    linear     y^ = s + (s - mean s) D + b                best linear map; ridge on D, so that lambda = inf is `mean`
    delay      y^_t = m + g (f_- u_{t-1} + f_0 u_t + f_+ u_{t+1}),  u = s - m
    position   y^_t = s_t + e(bin of t)                   mean error per position, less that of all
    rope       y^ = s + c (y - n)                         c from s = a y + c n + rest, means taken out, 0 <= c <= 1
    size       y^_t = s_t g |y_t| / |s_t|                 g = |s| / |y| of a usual token

Kept apart on purpose: `delay` has the student's own size (g) and mean (m), so that a wrong scale is no delay, and is
left out where the neighbours explain less than `GAIN` of the variance on held-out windows; `position` has no mean, so
that a constant shift is no lost position; `size` keeps the usual size, so that a wrong scale is no broken premise.
`rope` asks how far the student IS the teacher without its rotary embedding (c), rather than how much of the error that
would explain: a student that adds nothing, or noise, has c = 0, whatever the layer does with positions.

Weights are 1 / max(|y|, median |y|)^2, 0 at position 0 and at massive tokens: no token counts more than a usual one.
Sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

Apply = Callable[[Tensor], Tensor]
"""`batch pos d` -> `batch pos d`."""

RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)
"""Lambda, in mean squares of a channel of s."""
HELD = 4
"""One window in so many of the calibration text chooses lambda, and whether there is a delay."""
GAIN = 0.01


@dataclass(frozen=True)
class Known:
    """What a correction may ask of the teacher about the tokens it changes.

    Attributes:
        update: `batch pos d`, y.
        bare: `batch pos d`, n; None where there is no rotary embedding.
        massive: bool `batch pos`.
    """

    update: Tensor
    bare: Tensor | None
    massive: Tensor

    @cached_property
    def bulk(self) -> Tensor:
        """Bool `batch pos`: tokens that are neither first nor massive."""
        kept = ~self.massive
        kept[:, 0] = False
        return kept


@dataclass(frozen=True)
class Sample:
    """What fits are made from: `known` of all windows, and the student's update, `windows pos d`."""

    known: Known
    student: Tensor

    @property
    def teacher(self) -> Tensor:
        return self.known.update

    @property
    def bulk(self) -> Tensor:
        return self.known.bulk

    @cached_property
    def weight(self) -> Tensor:
        """Float64 `windows pos`."""
        size = self.teacher.double().norm(dim=-1)
        floor = size[self.bulk].median().clamp(min=torch.finfo(torch.float32).tiny)
        return torch.maximum(size, floor).pow(-2) * self.bulk

    def after(self, change: Callable[[Tensor, Known], Tensor] | None) -> Sample:
        """The same with the student corrected."""
        return self if change is None else replace(self, student=change(self.student, self.known))

    def parts(self) -> tuple[Sample, Sample]:
        """Windows to fit on, and windows to choose by."""
        held = torch.arange(len(self.teacher)) % HELD == HELD - 1
        return self._of(~held), self._of(held)

    def _of(self, windows: Tensor) -> Sample:
        known = self.known
        bare = None if known.bare is None else known.bare[windows]
        part = Known(known.update[windows], bare, known.massive[windows])
        return Sample(part, self.student[windows])

    def error(self, apply: Apply) -> float:
        """Weighed squared error of the corrected student."""
        gone = (self.teacher.double() - apply(self.student).double()).square().sum(-1)
        return float((self.weight * gone).sum())


def same(s: Tensor) -> Tensor:
    """No correction."""
    return s


def scale(sample: Sample) -> tuple[Apply, float]:
    """The map, and its factor; 1 where the student adds nothing."""
    w = sample.weight[..., None]
    y, s = sample.teacher.double(), sample.student.double()
    below = float((w * s * s).sum())
    factor = float((w * y * s).sum()) / below if below > 0 else 1.0
    return (lambda x: x * factor), factor


def mean(sample: Sample) -> tuple[Apply, Tensor]:
    """The map, and the vector that is added."""
    w = sample.weight[..., None]
    shift = (w * (sample.teacher.double() - sample.student.double())).sum((0, 1)) / w.sum()
    return (lambda x: x + shift.to(x)), shift


def affine(sample: Sample) -> Apply:
    """Slope and intercept of every channel; a channel that is constant in the student keeps slope 1."""
    w = sample.weight[..., None]
    y, s = sample.teacher.double(), sample.student.double()
    my, ms = ((w * v).sum((0, 1)) / w.sum() for v in (y, s))
    spread = (w * (s - ms).square()).sum((0, 1))
    slope = (w * (s - ms) * (y - my)).sum((0, 1)) / torch.where(spread > 0, spread, 1.0)
    slope = torch.where(spread > 0, slope, 1.0)
    shift = my - slope * ms
    return lambda x: x * slope.to(x) + shift.to(x)


def linear(sample: Sample) -> tuple[Apply, float]:
    """The map, and the ridge that the held-out windows chose."""
    fitting, held = sample.parts()
    family = _ridges(fitting)
    best = min(RIDGES, key=lambda ridge: held.error(family(ridge)))
    return _ridges(sample)(best), best


def _ridges(sample: Sample) -> Callable[[float], Apply]:
    """One decomposition for all ridges."""
    w = sample.weight.flatten()
    used = w > 0
    root = w[used].sqrt()[:, None]
    y = sample.teacher.flatten(0, 1)[used].double()
    s = sample.student.flatten(0, 1)[used].double()
    total = w.sum()
    ms = (root.square() * s).sum(0) / total
    error = y - s
    me = (root.square() * error).sum(0) / total
    a, b = root * (s - ms), root * (error - me)
    gram = a.T @ a
    values, vectors = torch.linalg.eigh(gram)
    target = vectors.T @ (a.T @ b)
    unit = float(gram.diagonal().mean())

    def at(ridge: float) -> Apply:
        if math.isinf(ridge) or unit == 0:
            return lambda x: x + me.to(x)
        matrix = vectors @ (target / (values.clamp(min=0) + ridge * unit)[:, None])

        def apply(x: Tensor) -> Tensor:
            return x + (x - ms.to(x)) @ matrix.to(x) + me.to(x)

        return apply

    return at


def delay(sample: Sample) -> tuple[Apply, tuple[float, float, float]]:
    """The filter over a token and its two neighbours, and its weights; (0, 1, 0) where neighbours do not help."""
    nothing = (same, (0.0, 1.0, 0.0))
    _, middle = mean_of(sample)
    fitting, held = sample.parts()
    weights = _taps(fitting, middle)
    alone = _taps(fitting, middle, neighbours=False)
    whole = _explained(held, middle, weights) - _explained(held, middle, alone)
    if not whole > GAIN:
        return nothing
    weights = _taps(sample, middle)
    centred = sample.student.double() - middle
    before, after = (v.norm(dim=-1)[sample.bulk] for v in (centred, _filtered(centred, weights)))
    used = (before > 0) & (after > 0)
    gain = float((before[used] / after[used]).log().mean().exp()) if bool(used.any()) else 1.0
    before_, own, behind = (float(gain * v) for v in weights)
    taps = (before_, own, behind)
    return (lambda x: middle.to(x) + _filtered(x - middle.to(x), taps)), taps


def mean_of(sample: Sample) -> tuple[Tensor, Tensor]:
    """Weighed means of teacher and student, `d`."""
    w = sample.weight[..., None]
    teacher, student = (
        (w * v.double()).sum((0, 1)) / w.sum() for v in (sample.teacher, sample.student)
    )
    return teacher, student


def _shifted(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x at t-1, t, t+1; what stands outside of the window is its nearest token."""
    before = torch.cat([x[:, :1], x[:, :-1]], 1)
    behind = torch.cat([x[:, 1:], x[:, -1:]], 1)
    return before, x, behind


def _filtered(x: Tensor, taps: tuple[float, float, float]) -> Tensor:
    parts = (tap * part for tap, part in zip(taps, _shifted(x), strict=True) if tap != 0.0)
    return sum(parts, torch.zeros((), dtype=x.dtype, device=x.device))


def _taps(sample: Sample, middle: Tensor, neighbours: bool = True) -> tuple[float, float, float]:
    """Least squares for the three weights (or the middle one alone), both sides centred."""
    own, _ = mean_of(sample)
    y = sample.teacher.double() - own
    shifted = _shifted(sample.student.double() - middle)
    parts = shifted if neighbours else shifted[1:2]
    w = sample.weight[..., None]
    gram = torch.stack([torch.stack([(w * p * q).sum() for q in parts]) for p in parts])
    side = torch.stack([(w * p * y).sum() for p in parts])
    found = torch.linalg.lstsq(gram, side[:, None], driver="gelsd").solution[:, 0].tolist()
    return tuple(found) if neighbours else (0.0, found[0], 0.0)


def _explained(sample: Sample, middle: Tensor, taps: tuple[float, float, float]) -> float:
    """Share of the teacher's variance, on other windows than the taps were made from."""
    own, _ = mean_of(sample)
    y = sample.teacher.double() - own
    made = _filtered(sample.student.double() - middle, taps)
    w = sample.weight[..., None]
    return 1.0 - float((w * (y - made).square()).sum() / (w * y.square()).sum().clamp(min=1e-300))


def rope(sample: Sample) -> float:
    """c: how far the student is the teacher without rotary embedding; 0 where there is none to lose."""
    if sample.known.bare is None:
        return 0.0
    w = sample.weight[..., None]
    y, n, s = (v.double() for v in (sample.teacher, sample.known.bare, sample.student))
    y, n, s = (v - (w * v).sum((0, 1)) / w.sum() for v in (y, n, s))
    lost = n - y  # s = (a + c) y + c (n - y) + rest: better conditioned than y and n
    gram = torch.stack([torch.stack([(w * p * q).sum() for q in (y, lost)]) for p in (y, lost)])
    if not float(gram[1, 1]) > 1e-9 * float(gram[0, 0]):
        return 0.0
    side = torch.stack([(w * p * s).sum() for p in (y, lost)])
    return min(1.0, max(0.0, float(torch.linalg.solve(gram, side)[1])))


def bins(n_pos: int) -> Tensor:
    """Int64 `pos`: 0 | 1 | 2-3 | 4-7 | ...: bin b > 0 begins at position 2^(b-1)."""
    at = torch.arange(n_pos)
    return torch.where(at == 0, 0, at.clamp(min=1).double().log2().floor().long() + 1)


def position(sample: Sample) -> Apply:
    """Mean error per bin of positions less the mean error of all, shrunk by how much of it is chance; 0 at position 0,
    which is the matter of another correction (the first token's update).

    Each bin's mean over windows is multiplied by max(0, 1 - noise / signal), the positive-part shrinkage of a mean
    (Efron and Morris 1973): a bin of few tokens says little.
    """
    error = sample.teacher.double() - sample.student.double()
    kept = sample.bulk
    where = bins(error.shape[1]).to(error.device)
    overall = error[sample.bulk].mean(0)
    steps = torch.zeros(
        int(where.max()) + 1, error.shape[2], dtype=error.dtype, device=error.device
    )
    for number in range(len(steps)):
        chosen = kept & (where == number)
        count = chosen.sum(1)
        used = count > 0
        if int(used.sum()) < 2:
            continue
        means = (error * chosen[..., None]).sum(1)[used] / count[used][:, None] - overall
        step = means.mean(0)
        noise = means.var(0).sum() / len(means)
        steps[number] = step * (1 - noise / step.square().sum().clamp(min=1e-300)).clamp(min=0)

    def apply(x: Tensor) -> Tensor:
        return x + steps.to(x)[bins(x.shape[1]).to(x.device)]

    return apply


def own_size(sample: Sample) -> float:
    """g, the geometric mean over usual tokens."""
    t, s = (v[sample.bulk].double().norm(dim=-1) for v in (sample.teacher, sample.student))
    used = (t > 0) & (s > 0)
    return float((s[used] / t[used]).log().mean().exp()) if bool(used.any()) else 1.0


def size(s: Tensor, y: Tensor, usual: float) -> Tensor:
    """Each token of s with the length of y, times `usual`; a token without direction stays 0."""
    length = s.norm(dim=-1, keepdim=True)
    return s * (usual * y.norm(dim=-1, keepdim=True) / torch.where(length > 0, length, 1.0))
