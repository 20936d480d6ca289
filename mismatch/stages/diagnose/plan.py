"""plan.json of a diagnosis. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from mismatch.runs.plan import SwapPlan
from mismatch.stages.diagnose.numbers import Found


@dataclass(frozen=True, kw_only=True)
class DiagnosisPlan(SwapPlan):
    """What was replaced, what correcting it recovers, and that in one sentence."""

    diagnosis: Found
    verdict: str
