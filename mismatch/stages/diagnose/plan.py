"""plan.json of a diagnosis. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from mismatch.runs.plan import SwapPlan
from mismatch.stages.diagnose.numbers import Found
from mismatch.stages.repair.forecast import Foretold


@dataclass(frozen=True, kw_only=True)
class DiagnosisPlan(SwapPlan):
    """What was replaced, what correcting it recovers, in one sentence, and the forecast of a repair."""

    diagnosis: Found
    verdict: str
    forecast: Foretold | None = None
