"""What a repair puts into the long table: the KL after each stage, of every student, and without each branch.

    stage    student    stat
    repair   swap       mean[after=S], gap_closed[after=S]     after a stage of the ladder; step counts the stages
    surgery  swap       mean                                 as it was swapped; of controls under their own name
    repair   swap       mean, mean_minus_C                   as repaired; its paired difference to control C
    repair   swap       mean[without=W.B]                    as repaired, branch B at W taken out
                        mean_minus_whole[without=W.B]        that minus the repaired model, paired

All at `logits`, in nats per token, intervals over documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mismatch.forward.heldout import Evaluated
from mismatch.runs.table import under
from mismatch.stages.repair.ladder_stages.stage_result import StageResult
from mismatch.stages.repair.plan import Branch

AS_SWAPPED, AS_REPAIRED = "swap", "repaired"


def stage_rows(stages: Sequence[StageResult], tokens: int) -> list[dict[str, Any]]:
    """KL and gap closed after each stage, on so many held-out tokens."""
    rows = []
    for number, stage in enumerate(stages):
        for stat, value, lo, hi in (
            ("mean", stage.kl, stage.lo, stage.hi),
            ("gap_closed", stage.gap_closed, stage.gap_lo, stage.gap_hi),
        ):
            rows.append(
                _row("kl", under(stat, after=stage.name), value, lo, hi, tokens, step=number)
            )
    return rows


def student_rows(evaluated: Mapping[str, Evaluated], seed: int) -> list[dict[str, Any]]:
    """KL and NLL of the swap, of the repaired model and of controls, and the repaired model minus each control."""
    rows = []
    repaired = evaluated[AS_REPAIRED]
    for name, found in evaluated.items():
        student = "swap" if name == AS_REPAIRED else name
        stage = "repair" if name == AS_REPAIRED else "surgery"
        for metric, stat, read in (
            ("kl", "mean", found.kl.mean(seed)),
            ("nll", "shift", found.nll.mean(seed)),
        ):
            rows.append(_row(metric, stat, *read, stage=stage, student=student))
        if name not in (AS_SWAPPED, AS_REPAIRED):
            less = (repaired.kl - found.kl).mean(seed)
            rows.append(_row("kl", f"mean_minus_{name}", *less))
    return rows


def branch_rows(knocked: Sequence[Branch], tokens: int) -> list[dict[str, Any]]:
    """KL without each branch. A part without branches is a row without a value: not applicable."""
    rows = []
    for at in knocked:
        given = {"without": f"{at.where}.{at.branch or 'none'}"}
        n = tokens if at.branch else 0
        rows.append(_row("kl", under("mean", **given), at.kl, at.lo, at.hi, n))
        more = (at.more, at.more_lo, at.more_hi)
        rows.append(_row("kl", under("mean_minus_whole", **given), *more, n))
    return rows


def _row(
    metric: str,
    stat: str,
    value: float,
    lo: float,
    hi: float,
    n: int,
    *,
    stage: str = "repair",
    student: str = "swap",
    step: int = 0,
) -> dict[str, Any]:
    return {
        "stage": stage,
        "step": step,
        "mode": "free",
        "student": student,
        "site": "logits",
        "metric": metric,
        "stat": stat,
        "value": value,
        "lo": lo,
        "hi": hi,
        "n": n,
    }
