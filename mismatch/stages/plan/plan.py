"""plan.json of a choice of layers. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from mismatch.stages.plan.choose import Score
from mismatch.stages.scan.plan import TaskPlan
from mismatch.stages.scan.reliability import Overlap, Reliability


@dataclass(frozen=True)
class StepPlan:
    """A layer that the greedy method chose, and the KL of all chosen so far, nats per token, with its interval.

    `again`: share of the draws of other documents and prompts that take the same one, given those before; None: too
    few to draw from, or all cost the same.
    """

    layer: int
    mechanism: str
    kl: float
    lo: float
    hi: float
    lost: float
    again: float | None = None


@dataclass(frozen=True)
class Budgets:
    """Most KL, nats per token, and most retrieval, nats per key; None: no such budget."""

    kl: float | None
    lost: float | None


@dataclass(frozen=True)
class Predicted:
    """What the scan says of the chosen layers, added up."""

    kl: float
    lost: float


@dataclass(frozen=True, kw_only=True)
class ChoicePlan:
    """The choice, how it was made, and its budgets.

    Attributes:
        choice: by mechanism, its layers.
        scan: the run id of the scan that chose; None for greedy.
        score: what it was chosen by (`scores.py`).
        answers: tasks that this score averages.
        scores: every layer that could be chosen, alone.
        steps: of the greedy method.
        reliability: what other documents and prompts would have chosen; None: too few, all
            layers cost the same, or the choice did not look.
        overlaps: what the choice shares with that of other scores, by their names.
    """

    model: str
    swap: str
    method: str
    choice: dict[str, tuple[int, ...]]
    n_layers: int
    among: tuple[int, ...]
    budgets: Budgets
    tasks: dict[str, TaskPlan]
    notes: tuple[str, ...]
    scan: str | None = None
    scores: tuple[Score, ...] = ()
    predicted_by_scan: Predicted | None = None
    steps: tuple[StepPlan, ...] = ()
    score: str = "kl"
    answers: tuple[str, ...] = ()
    reliability: Reliability | None = None
    overlaps: dict[str, Overlap] = field(default_factory=dict)

    @property
    def chosen(self) -> int:
        """How many layers were chosen."""
        return sum(map(len, self.choice.values()))
