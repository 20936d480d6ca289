"""What a diagnosis found: plain numbers, as plan.json holds them. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mismatch.runs.intervals import FORMER

SAYS = {
    "scale": "one scale",
    "mean": "the mean of each channel",
    "affine": "mean and scale of each channel",
    "linear": "the best linear map",
    "delay": "a filter over neighbouring tokens",
    "position": "the mean error at each position",
    "rope": "what the rotary embedding carried",
    "size": "the size of each token's update",
    "first": "the update of the first token",
    "massive": "the updates of massive tokens",
}
"""What each correction corrects."""


@dataclass(frozen=True)
class Share:
    """A share of the damage, 1 = all of it, with its 95 % interval; nan where there is none."""

    value: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Kl:
    """KL(teacher || student), nats per token, with its 95 % interval."""

    value: float
    lo: float
    hi: float
    n: int


@dataclass(frozen=True)
class Correction:
    """One correction.

    Attributes:
        name: of `SAYS`; `head 3`, `without memory`, `with first_token`; `layer 12 attn_out`, corrected whole.
        group: a cause, or `part`.
        share: of the KL that it recovers.
        kl: what is left.
        layer, head: where it acts alone; None: at all places.
        does_nothing: it does not move the update, and was not run.
        says: in words.
    """

    name: str
    group: str
    share: Share
    kl: Kl
    layer: int | None = None
    head: int | None = None
    does_nothing: bool = False
    says: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "says", self.says or _says(self.name))


def _says(name: str) -> str:
    """A correction in words: `head 3 corrected`, `memory left out`."""
    if name in SAYS:
        return SAYS[name]
    word, _, rest = name.partition(" ")
    return {"without": f"{rest} left out", "with": f"{rest} corrected"}.get(
        word, f"{name} corrected"
    )


@dataclass(frozen=True)
class Found:
    """A whole diagnosis.

    Attributes:
        swap: in canonical form.
        damage: KL of the swap.
        nll: its NLL difference, likewise.
        controls: KL of each control in the same places.
        corrections: every one.
        causes: Shapley shares of the three causes.
        joint: KL recovered by each set of causes, by their names joined with `+`.
        unexplained: what all three together do not recover.
        leading: name of the simplest correction that recovers (nearly) as much as any; None: none recovers much.
        places: for each place `layer`, `site`, `mechanisms`, and numbers: `forced_error`, squared, of the update on the
            teacher's own input, 1 = as far as an update of zero; `linear_error` likewise behind the best linear map, on
            text it was not fitted on; `corrected_error` of each correction; `update_to_stream` and
            `update_to_stream_student`; what was fitted (`scale`, `rope`, ...); `head_errors`, the share of the error
            that each head recovers.
        behind: `layers`, and how far the stream leaving each is off, `||s - t|| / ||t||`; `growth` from the first to
            the last.
        not_applicable: what could not be asked, and why.
        evidence: readings of an earlier run.
        over: what the intervals are over.
    """

    swap: str
    damage: Kl
    nll: Share
    controls: dict[str, Kl] = field(default_factory=dict)
    corrections: tuple[Correction, ...] = ()
    causes: dict[str, Share] = field(default_factory=dict)
    joint: dict[str, Share] = field(default_factory=dict)
    unexplained: Share | None = None
    leading: str | None = None
    places: tuple[dict[str, Any], ...] = ()
    behind: dict[str, Any] = field(default_factory=dict)
    not_applicable: tuple[str, ...] = ()
    evidence: tuple[dict[str, Any], ...] = ()
    over: str = FORMER

    @property
    def lead(self) -> Correction | None:
        """The leading correction."""
        return None if self.leading is None else self.get(self.leading)

    def get(self, name: str) -> Correction | None:
        """A correction by name."""
        return next((r for r in self.corrections if r.name == name), None)
