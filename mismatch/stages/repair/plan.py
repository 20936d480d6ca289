"""plan.json of a repair. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mismatch.runs.intervals import FORMER
from mismatch.runs.plan import SwapPlan
from mismatch.stages.repair.ladder_stages.stage_result import StageResult

Reading = tuple[float, float, float]
"""Value, and the ends of its 95 % interval."""

ALL, NONE = "all", "none"
"""Which branches are kept while needles are asked for: every one, none; else the name of the one that is."""


@dataclass(frozen=True)
class StudentReading:
    """One student on the evaluation text: nats per token.

    Attributes:
        kl, nll: as `mismatch.forward.heldout.Evaluated`.
        gap_closed: the share of the swap's KL, as it was made, that this one closes.
        repaired_minus: KL of the repaired model minus that of this one, paired.
        repaired_closes: the share of this one's KL that the repaired model closes, paired; NaN in older plans.
    """

    kl: Reading
    nll: Reading
    gap_closed: Reading
    repaired_minus: Reading
    repaired_closes: Reading = (float("nan"),) * 3


@dataclass(frozen=True)
class Branch:
    """One branch taken out of the repaired model, or a module without branches (`branch` None).

    Attributes:
        layer, where, branch: which; taken out of many modules at once, `layer` is the first of them.
        kl, lo, hi: of the repaired model without it, nats per token.
        more, more_lo, more_hi: that minus the KL with it, paired.
        verdict: used, bypassed, open, or not applicable.
    """

    layer: int
    where: str
    branch: str | None
    kl: float = float("nan")
    lo: float = float("nan")
    hi: float = float("nan")
    more: float = float("nan")
    more_lo: float = float("nan")
    more_hi: float = float("nan")
    verdict: str = "not applicable"


@dataclass(frozen=True)
class Gates:
    """The gates by name, one number a head: before and after; `weighs` names the branch of those that weigh one."""

    weighs: dict[str, str] = field(default_factory=dict)
    start: dict[str, list[float]] = field(default_factory=dict)
    end: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RepairPlan(SwapPlan):
    """What was replaced and what the repair did.

    Attributes:
        stages: of the repair ladder, as run; the first is `swap`, before them.
        students: swap, repaired model and controls on the evaluation text.
        branches: each taken out in turn.
        notes: which text was trained on; probes that could not be asked.
        teacher: name and fingerprint of the model.
        over: what the intervals are over.
    """

    stages: tuple[StageResult, ...]
    students: dict[str, StudentReading]
    branches: tuple[Branch, ...]
    gates: Gates
    notes: tuple[str, ...]
    teacher: dict[str, Any]
    over: str = FORMER
