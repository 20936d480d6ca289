"""`mismatch probe`: inputs made to ask one question each, put to teacher, swap and controls. It takes minutes, so it is
not resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from mismatch.report.words import plan_lines, subject
from mismatch.stages.base import Finding, Outcome, Stage
from mismatch.stages.lost_retrieval import lost_retrieval
from mismatch.stages.opening import Opened
from mismatch.stages.probe.config import ProbeConfig
from mismatch.stages.probe.questions import Questions, answers, needs_text, questions
from mismatch.stages.probe.result import Probed
from mismatch.stages.swapped import swap_calibration, swap_texts, warned
from mismatch.texts.windows import Windows


@dataclass(frozen=True)
class Prepared:
    """What will be asked, and windows for mechanisms that set themselves from them (None: there is none)."""

    asked: Questions
    calibration: Windows | None


class Probe(Stage[ProbeConfig, Prepared]):
    help = "Ask teacher and swapped model what ordinary text hides: copying, retrieval, position, memory."
    Config = ProbeConfig
    Result = Probed
    examples = (
        'mismatch probe --model smollm2 --swap "layer16:nope"',
        'mismatch probe --model smollm2 --swap "layer18:infini(segment=64)" --probes passkey,memory',
    )
    report = "mismatch.stages.probe.report"
    plan = "mismatch.runs.plan:SwapPlan"
    distributed = True

    def prepare(self, opened: Opened[ProbeConfig]) -> Prepared:
        config = opened.config
        opened.planned()  # refuses what model, swap and controls do not allow
        if not needs_text(config):
            calibration = opened.calibration(swap_calibration(opened))
            return Prepared(questions(config, opened, None), calibration)
        calibration, held_out = swap_texts(opened)
        cut = opened.cut("evaluation", held_out, config.tokens)
        return Prepared(questions(config, opened, cut), calibration)

    def announce(self, opened: Opened[ProbeConfig], prepared: Prepared) -> str:
        plan = opened.planned()[0].plan
        lines = [f"{subject(plan):8}{line}" for line in plan_lines(plan)]
        return "\n".join([*lines, f"probes  {', '.join(prepared.asked.probes)}"])

    def run(self, opened: Opened[ProbeConfig], prepared: Prepared) -> Outcome | None:
        asked, config = prepared.asked, opened.config
        students = opened.students(prepared.calibration)
        plan = warned(students[0].plan, config.seq_len, config.controls)
        if opened.folder is not None:
            opened.folder.log(f"{', '.join(asked.probes)}; {len(students)} students")
        answered = answers(asked, opened.teacher, students, opened.progress)
        if not opened.ranks.first:
            return None
        plan = replace(plan, warnings=(*plan.warnings, *answered.warnings))
        return Outcome(answered.rows, plan, {"samples": config.samples}, answered.seconds)

    def findings(
        self, opened: Opened[ProbeConfig], outcome: Outcome, table: pd.DataFrame
    ) -> Sequence[Finding]:
        found = lost_retrieval(table, outcome.plan.clauses, opened.config.model)
        return () if found is None else (found,)
