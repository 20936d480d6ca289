"""plan.json of a training. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from mismatch.runs.intervals import FORMER
from mismatch.runs.plan import SwapPlan

Reading = tuple[float, float, float]
"""Value, and the ends of its 95 % interval."""


@dataclass(frozen=True)
class Look:
    """The drift from the teacher after so many steps, on the evaluation text.

    Attributes:
        step, tokens: trained so far.
        kl, nll: KL to the teacher, and NLL minus the teacher's, nats per token.
        shift: of each layer, the relative L2 error of the stream leaving it.
        probes: what was asked, by the name of each reading.
    """

    step: int
    tokens: int
    kl: float
    nll: float
    shift: tuple[float, ...]
    probes: dict[str, float]


@dataclass(frozen=True)
class StudentReading:
    """One student on the evaluation text: nats per token; `trained_minus` is the trained model minus this, paired."""

    kl: Reading
    nll: Reading
    trained_minus: Reading


@dataclass(frozen=True, kw_only=True)
class TrainPlan(SwapPlan):
    """What was replaced and how it was trained.

    Attributes:
        looks: in the order of steps.
        step: whose weights are kept: the last one, or with load_best_model_at_end the best on validation text.
        students: swap, trained model and controls on the evaluation text.
        parameters: numbers that trained.
        notes: which text was trained on, and what was left out.
        over: what the intervals are over.
    """

    looks: tuple[Look, ...]
    step: int
    students: dict[str, StudentReading]
    parameters: int
    notes: tuple[str, ...] = ()
    over: str = FORMER

    @property
    def kept(self) -> Look:
        """The look at the weights that are kept."""
        return next(look for look in self.looks if look.step == self.step)
