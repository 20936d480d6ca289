"""What a repair puts into the long table: the KL after each stage, of every student, and without each branch.

    stage    student    stat
    repair   swap       mean[after=S], gap_closed[after=S]     after a stage of the ladder; step counts the stages
                        answers_minus_teacher[after=S]         NLL of the answers of the judge's prompts, where it asks
    surgery  swap       mean                                 as it was swapped; of controls under their own name
    repair   swap       mean, mean_minus_C                   as repaired; its paired difference to control C
    repair   swap       mean[without=W.B]                    as repaired, branch B at W taken out
                        mean_minus_whole[without=W.B]        that minus the repaired model, paired

All at `logits`, in nats per token; `over` says what intervals are over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mismatch.forward.heldout import Evaluated
from mismatch.metrics.sums.per_document import Estimate
from mismatch.metrics.sums.readings import Reading
from mismatch.runs.intervals import SAMPLES
from mismatch.runs.table import under
from mismatch.stages.repair.ladder_stages.stage_result import StageResult
from mismatch.stages.repair.plan import Branch

AS_SWAPPED, AS_REPAIRED = "swap", "repaired"


def stage_rows(stages: Sequence[StageResult], tokens: int, over: str) -> list[dict[str, Any]]:
    """KL and gap closed after each stage, on so many held-out tokens; and what the answers of prompts lost."""
    rows = []
    for number, stage in enumerate(stages):
        for stat, found in (
            ("mean", Estimate(stage.kl, stage.lo, stage.hi, tokens, over)),
            ("gap_closed", Estimate(stage.gap_closed, stage.gap_lo, stage.gap_hi, tokens, over)),
        ):
            rows.append(_row("kl", under(stat, after=stage.name), found, step=number))
        if stage.answers:
            lost = (stage.retrieval, stage.retrieval_lo, stage.retrieval_hi)
            found = Estimate(*lost, stage.answers, SAMPLES)
            stat = under("answers_minus_teacher", after=stage.name)
            rows.append(_row("nll", stat, found, step=number))
    return rows


def student_rows(evaluated: Mapping[str, Evaluated]) -> list[dict[str, Any]]:
    """KL and NLL of the swap, of the repaired model and of controls, and the repaired model minus each control."""
    rows = []
    repaired = evaluated[AS_REPAIRED]
    for name, found in evaluated.items():
        student = "swap" if name == AS_REPAIRED else name
        stage = "repair" if name == AS_REPAIRED else "surgery"
        for metric, stat, read in (
            ("kl", "mean", found.kl.mean()),
            ("nll", "shift", found.nll.mean()),
        ):
            rows.append(_row(metric, stat, read, stage=stage, student=student))
        if name not in (AS_SWAPPED, AS_REPAIRED):
            less = (repaired.kl - found.kl).mean()
            rows.append(_row("kl", f"mean_minus_{name}", less))
    return rows


def branch_rows(knocked: Sequence[Branch], tokens: int, over: str) -> list[dict[str, Any]]:
    """KL without each branch. A part without branches is a row without a value: not applicable."""
    rows = []
    for at in knocked:
        given = {"without": f"{at.where}.{at.branch or 'none'}"}
        n = tokens if at.branch else 0
        for stat, found in (
            ("mean", Estimate(at.kl, at.lo, at.hi, n, over)),
            ("mean_minus_whole", Estimate(at.more, at.more_lo, at.more_hi, n, over)),
        ):
            rows.append(_row("kl", under(stat, **given), found))
    return rows


def _row(
    metric: str,
    stat: str,
    found: Estimate,
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
        **Reading.of(stat, found).as_row(),
    }
