"""`mismatch diagnose`: correct one thing at a time in what the swapped module adds, and see how much damage goes.

Corrections are fitted on calibration text and measured on evaluation text. It takes minutes, so it is not resumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mismatch.errors import DataError, NumericsError
from mismatch.forward.heldout import Evaluated, Trial
from mismatch.metrics.sums.per_document import Units
from mismatch.report import intervals
from mismatch.report.words import plan_lines, subject
from mismatch.runs.folder import Run
from mismatch.runs.intervals import DOCUMENTS
from mismatch.stages.base import Finding, Outcome, Stage
from mismatch.stages.diagnose.config import WINDOWS, DiagnoseConfig
from mismatch.stages.diagnose.corrections import SUBSETS
from mismatch.stages.diagnose.earlier_run import earlier_run, readings_of
from mismatch.stages.diagnose.fitted import TakenApart, joint_name
from mismatch.stages.diagnose.heldout import CorrectedHeldOut
from mismatch.stages.diagnose.numbers import Correction, Found, Kl, Share
from mismatch.stages.diagnose.places import places_of
from mismatch.stages.diagnose.plan import DiagnosisPlan
from mismatch.stages.diagnose.result import Diagnosed
from mismatch.stages.diagnose.rows import rows_of
from mismatch.stages.diagnose.shapley import causes_of, kl_of, leading, share_of
from mismatch.stages.diagnose.verdict import headline, verdicts
from mismatch.stages.opening import Opened
from mismatch.stages.swapped import swap_calibration, warned
from mismatch.surgery.operate import Student
from mismatch.texts.windows import Windows

NOTHING = 1e-6
"""Nats: a KL at or below this comes from rounding (another kernel brings up to 5e-7)."""
FEW = 8
"""With fewer documents the intervals are too narrow."""


@dataclass(frozen=True)
class Prepared:
    """Windows to evaluate, to fit and to calibrate on (None: nothing calibrates), and an earlier run of the swap."""

    cut: Windows
    fit: Windows
    calibration: Windows | None
    earlier: Run | None


class Diagnose(Stage[DiagnoseConfig, Prepared]):
    help = "Correct one thing at a time in what the swapped module adds, and name the cause of the damage."
    Config = DiagnoseConfig
    Result = Diagnosed
    examples = (
        'mismatch diagnose --model smollm2 --swap "layer12:infini(segment=64)"',
        "mismatch diagnose runs/TRACE",
    )
    report = "mismatch.stages.diagnose.report"
    plan = "mismatch.stages.diagnose.plan:DiagnosisPlan"
    distributed = True
    starts_from = ("trace", "probe")
    takes = (
        "model",
        "revision",
        "dtype",
        "swap",
        "student",
        "data",
        "text_field",
        "selected_by",
        "allow_overlap",
        "calibration_data",
        "seed",
    )
    run_setting = "earlier_run"

    def prepare(self, opened: Opened[DiagnoseConfig]) -> Prepared:
        config = opened.config
        earlier = earlier_run(config)
        places_of(opened.planned()[0].plan)
        calibration, held_out = opened.apart(calibrates=True)
        assert calibration is not None
        cut = opened.cut("evaluation", held_out, config.tokens)
        if not Units.by(cut.doc, cut.offset).enough:
            raise DataError(
                f"{held_out.source}: the evaluation tokens are {len(cut)} windows of {cut.n_docs} documents, and a "
                f"diagnosis rests on intervals; {intervals.WHY_NONE}",
                hint="give text of more documents, or more --tokens, or a shorter --seq-len",
            )
        fit = opened.cut("fit", calibration, config.fit_tokens)
        if len(fit) < WINDOWS:
            raise DataError(
                f"{calibration.source}: {len(fit)} windows of calibration text; corrections are fitted on {WINDOWS} "
                "or more",
                hint="give more calibration text, or a shorter --seq-len",
            )
        windows = opened.calibration(swap_calibration(opened), calibration)
        return Prepared(cut, fit, windows, earlier)

    def announce(self, opened: Opened[DiagnoseConfig], prepared: Prepared) -> str:
        config, plan = opened.config, opened.planned()[0].plan
        lines = [f"{subject(plan):8}{line}" for line in plan_lines(plan)]
        lines += [
            f"fit     {config.calibration_data}, {prepared.fit.tokens} tokens",
            f"text    {config.data}, {prepared.cut.tokens} tokens of {prepared.cut.n_docs} documents",
        ]
        return "\n".join(lines)

    def loaded(self, opened: Opened[DiagnoseConfig], prepared: Prepared) -> None:
        readings_of(prepared.earlier, *_fingerprints(opened))

    def run(self, opened: Opened[DiagnoseConfig], prepared: Prepared) -> Outcome | None:
        config, teacher, cut = opened.config, opened.teacher, prepared.cut
        swap, *controls = opened.students(prepared.calibration)
        places = places_of(swap.plan)

        def measured(
            config: DiagnoseConfig,
        ) -> tuple[TakenApart, CorrectedHeldOut, dict[str, Evaluated]]:
            with opened.bar(0, "the teacher, on calibration text", "batch") as bar:
                apart = TakenApart(teacher, swap, places, config, prepared.fit)
                bar.set_description("the teacher, on evaluation text")
                held_out = CorrectedHeldOut(
                    teacher.layout,
                    places,
                    cut,
                    swap.plan.first or 0,
                    batch_size=config.batch_size,
                    scored=config.scored,
                    seed=config.seed,
                    student=swap.layout,
                    complete=apart.complete,
                    progress=bar.update,
                )
                bar.set_description("the swap and its controls")
                first = [Trial(s.name, s.layout) for s in (swap, *controls)]
                bar.total = len(held_out.batches) * (1 + len(first))
                evaluated = held_out.evaluate_all(first, opened.ranks)
                damage = evaluated[swap.name]
                if not math.isfinite(damage.kl.total):
                    raise NumericsError(
                        "the KL of the swap is not a number: its activations are not finite",
                        hint="mismatch trace shows where they leave",
                    )
                if kl_of(damage).value > NOTHING:
                    bar.set_description("fits on calibration text")
                    apart.fit()
                    bar.set_description("corrections")
                    trials = apart.trials(held_out.sides)
                    bar.total += len(held_out.batches) * len(trials)
                    bar.refresh()
                    evaluated |= held_out.evaluate_all(trials, opened.ranks)
                return apart, held_out, evaluated

        apart, held_out, evaluated = opened.fitting(measured, "in the diagnosis")
        if not opened.ranks.first:
            return None
        readings = readings_of(prepared.earlier, *_fingerprints(opened))
        found = _found(config, readings, swap, evaluated, apart, held_out)
        base = warned(swap.plan, cut.seq_len)
        few = []
        if cut.n_docs < FEW:
            over = Units.by(cut.doc, cut.offset).over
            what = "wide" if over == DOCUMENTS else f"over {over}, and say nothing of other texts"
            few.append(
                f"{cut.n_docs} evaluation documents: intervals are {what}; take --tokens "
                f"{FEW * cut.seq_len} or more, or text of more documents"
            )
        plan = DiagnosisPlan(
            spec=base.spec,
            clauses=base.clauses,
            warnings=(*base.warnings, *few),
            apart=base.apart,
            diagnosis=found,
            verdict=headline(found),
        )
        return Outcome(rows_of(found), plan)

    def findings(
        self, opened: Opened[DiagnoseConfig], outcome: Outcome, table: pd.DataFrame
    ) -> Sequence[Finding]:
        plan: DiagnosisPlan = outcome.plan
        return verdicts(plan.diagnosis, opened.config, plan.clauses, plan.apart)


def _fingerprints(opened: Opened[DiagnoseConfig]) -> tuple[str, str | None]:
    """Of the teacher, and of a student that was trained elsewhere."""
    student = opened.student_info
    return opened.teacher.info.sha256, None if student is None else student.sha256


def _found(
    config: DiagnoseConfig,
    readings: tuple[dict[str, Any], ...],
    swap: Student,
    evaluated: dict[str, Evaluated],
    apart: TakenApart,
    held_out: CorrectedHeldOut,
) -> Found:
    """Shares, causes, places: from sums to numbers."""
    damage = evaluated[swap.name]
    behind = {
        "layers": list(held_out.behind.layers),
        "errors": list(held_out.behind.errors),
        "growth": held_out.behind.errors[-1] / held_out.behind.errors[0]
        if held_out.behind.errors[0] > 0
        else math.nan,
    }
    shared: dict[str, Any] = {
        "swap": swap.plan.spec,
        "damage": kl_of(damage),
        "nll": Share(*damage.nll.mean()[:3]),
        "controls": {name: kl_of(evaluated[name]) for name in config.controls},
        "behind": behind,
        "evidence": readings,
        "over": damage.kl.units,
    }
    if not apart.fitted:
        return Found(**shared)
    none = (Share(0.0, 0.0, 0.0), Kl(**vars(shared["damage"])))
    corrections = []
    for one in apart.asked:
        share, kl = none
        after = evaluated.get(apart.trial_of(one.trial))
        if after is not None:
            share, kl = share_of(after, damage), kl_of(after)
        corrections.append(
            Correction(one.name, one.group, share, kl, one.layer, one.head, after is None)
        )
    joint = {
        chosen: evaluated.get(apart.trial_of(joint_name(chosen)), damage) for chosen in SUBSETS
    }
    causes, unexplained = causes_of(joint, damage)
    return Found(
        **shared,
        corrections=tuple(corrections),
        causes=causes,
        joint={"+".join(c): share_of(j, damage) for c, j in joint.items()},
        unexplained=unexplained,
        leading=leading(corrections),
        places=tuple(apart.facts(held_out.batches, held_out.sides)),
        not_applicable=tuple(apart.not_applicable),
    )
