"""Every correction by name, the three causes they speak for, and one place fitted.

| cause | corrections, from the simplest | what they restore |
|---|---|---|
| distribution | scale, mean, affine, linear | the update as a map of the student's own, token by token |
| position | delay, position, rope | what a token's place decides, and what the rotary embedding carried |
| premise | size, first, massive | a step as small as the teacher's; its step at the tokens that hold the rest still |

A cause as a whole is all of its corrections together: `delay`, `rope`, `position` one after the other; then `linear`;
then `size`, `first`, `massive`. They are fitted in this order, each on what those before it left.

A map that is fitted on usual tokens may do harm at the first and at massive ones: there it acts only if it errs less on
calibration text. `fits` says what each correction is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from mismatch.stages.diagnose import fits
from mismatch.stages.diagnose.fits import Apply, Known, Sample

Change = Callable[[Tensor, Known], Tensor]
"""The student's update and what is known of the teacher's -> the corrected update, `batch pos d`."""

CAUSES: dict[str, tuple[str, ...]] = {
    "distribution": ("scale", "mean", "affine", "linear"),
    "position": ("delay", "position", "rope"),
    "premise": ("size", "first", "massive"),
}
ORDER = ("position", "distribution", "premise")
"""In which they are fitted when several are corrected together."""
SUBSETS = tuple(chosen for count in (1, 2, 3) for chosen in combinations(tuple(CAUSES), count))

CHANGED = 1e-6
"""A correction that moves the update by less than this share of its size does nothing."""


@dataclass(frozen=True)
class Fitted:
    """One place.

    Attributes:
        single: by name; None does nothing here.
        joint: by causes, as in `SUBSETS`; None does nothing here.
        facts: what was fitted, as numbers.
    """

    single: dict[str, Change | None]
    joint: dict[tuple[str, ...], Change | None]
    facts: dict[str, float] = field(default_factory=dict)


def fit(sample: Sample) -> Fitted:
    """Fit every correction of one place, on calibration text."""
    facts: dict[str, float] = {}
    single: dict[str, Change | None] = {}
    scale, facts["scale"] = fits.scale(sample)
    mean, _ = fits.mean(sample)
    linear, facts["ridge"] = fits.linear(sample)
    delay, taps = fits.delay(sample)
    facts |= dict(zip(("tap_before", "tap_own", "tap_behind"), taps, strict=True))
    facts["rope"], facts["size"] = fits.rope(sample), fits.own_size(sample)
    for name, apply in (
        ("scale", scale),
        ("mean", mean),
        ("affine", fits.affine(sample)),
        ("linear", linear),
        ("delay", delay),
    ):
        single[name] = _sparing(apply, sample)
    single["position"] = _plain(fits.position(sample))
    single["rope"] = _rope(facts["rope"])
    single["size"] = _size(facts["size"])
    single["first"], single["massive"] = _first, _massive
    single = {name: _effective(change, sample) for name, change in single.items()}
    joint = {chosen: _together(chosen, sample, single) for chosen in SUBSETS}
    return Fitted(single, joint, facts)


RICHEST: dict[str, tuple[str, ...]] = {
    "position": ("delay", "rope", "position"),
    "distribution": ("linear",),
    "premise": ("size", "first", "massive"),
}
"""What a cause corrects, in this order."""


def _together(
    causes: tuple[str, ...], sample: Sample, single: dict[str, Change | None]
) -> Change | None:
    """All corrections of these causes, each fitted on what those before it left; the first one is fitted already."""
    taken: list[Change] = []
    now = sample
    for name in (name for cause in ORDER if cause in causes for name in RICHEST[cause]):
        change = _effective(_again(name, now), now) if taken else single[name]
        if change is not None:
            taken.append(change)
            now = now.after(change)
    if len(taken) < 2:
        return taken[0] if taken else None
    return _chain(taken)


def _again(name: str, now: Sample) -> Change | None:
    """One correction, fitted on what others left."""
    if name == "linear":
        return _sparing(fits.linear(now)[0], now)
    if name == "delay":
        return _sparing(fits.delay(now)[0], now)
    if name == "rope":
        return _rope(fits.rope(now))
    if name == "position":
        return _plain(fits.position(now))
    if name == "size":
        return _size(fits.own_size(now))
    return {"first": _first, "massive": _massive}[name]


def _chain(changes: list[Change]) -> Change:
    def change(s: Tensor, known: Known) -> Tensor:
        for one in changes:
            s = one(s, known)
        return s

    return change


def _plain(apply: Apply) -> Change:
    return lambda s, _known: apply(s)


def _sparing(apply: Apply, sample: Sample) -> Change:
    """The map, at first and massive tokens only if it errs less there."""
    special = ~sample.bulk
    y, s = sample.teacher[special], sample.student[special]
    mapped = apply(sample.student)[special]
    # Relative to the token's own size, so that one huge token does not decide.
    unit = y.double().square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    errors = [((y - v).double().square().sum(-1) / unit).sum() for v in (mapped, s)]
    if float(errors[0]) < float(errors[1]):
        return _plain(apply)
    return lambda x, known: torch.where(known.bulk[..., None], apply(x), x)


def _rope(share: float) -> Change | None:
    if share == 0.0:
        return None
    return lambda s, known: s if known.bare is None else s + share * (known.update - known.bare)


def _size(usual: float) -> Change:
    return lambda s, known: torch.where(known.bulk[..., None], fits.size(s, known.update, usual), s)


def _first(s: Tensor, known: Known) -> Tensor:
    return torch.cat([known.update[:, :1], s[:, 1:]], 1)


def _massive(s: Tensor, known: Known) -> Tensor:
    huge = known.massive.clone()
    huge[:, 0] = False
    return torch.where(huge[..., None], known.update, s)


def _effective(change: Change | None, sample: Sample) -> Change | None:
    """None where it does next to nothing on calibration text."""
    if change is None:
        return None
    before = sample.student
    moved = (change(before, sample.known) - before).double().norm(dim=-1)
    size = torch.maximum(before.double().norm(dim=-1), sample.teacher.double().norm(dim=-1))
    return change if bool((moved > CHANGED * size).any()) else None
