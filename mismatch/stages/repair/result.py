"""What a repair returns: the stages, the students beside it, the checkpoint. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mismatch.report.intervals import band, side
from mismatch.stages.base import Result
from mismatch.stages.repair.plan import RepairPlan
from mismatch.stages.repair.report.curve_figure import branch_line, repair_curve, stage_table
from mismatch.stages.repair.report.needles_by_branch import needle_lines
from mismatch.stages.repair.report.page import probe_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mismatch.surgery.operate import Student


NATS = "{:.4f}".format
NUMBER = re.compile(r"\d[\d.,]*")
CHECKPOINT = "checkpoint"
"""The repaired model, inside the run folder."""


ALIKE = 3
"""Notes that differ in numbers only, as those of many layers do: so many are said in a terminal."""


def some_of(notes: Sequence[str]) -> list[str]:
    """Each note once; of many that differ in their numbers only the first ones, and how many there are."""
    kinds: dict[str, list[str]] = {}
    for note in dict.fromkeys(notes):
        kinds.setdefault(NUMBER.sub("0", note), []).append(note)
    said: list[str] = []
    for alike in kinds.values():
        less = alike if len(alike) <= ALIKE + 1 else alike[:ALIKE]
        said += less
        if more := len(alike) - len(less):
            said.append(f"{more} more like it")
    return said


@dataclass(frozen=True, repr=False)
class Repaired(Result):
    """One finished repair. `student` is the repaired model, where it is still in memory."""

    student: Student | None = None

    @property
    def stages(self) -> pd.DataFrame:
        """A row per stage of the ladder: KL and its interval, gap closed, tokens, seconds."""
        return stage_table(self.plan)

    @property
    def checkpoint(self) -> Path | None:
        """The repaired model as a Hugging Face folder."""
        return None if self.run.path is None else self.run.path / CHECKPOINT

    def as_dict(self) -> dict[str, Any]:
        rows = json.loads(self.stages.to_json(orient="records"))
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        return super().as_dict() | {"stages": rows, "checkpoint": checkpoint}

    def curve(self) -> Figure:
        """KL against tokens and against time, one colour a stage."""
        return repair_curve(self.plan)

    def words(self) -> str:
        plan: RepairPlan = self.plan
        parts = [[f"warning: {text}" for text in plan.warnings]]
        parts += [self._stage_lines(), self._control_lines()]
        parts.append(probe_lines(self.table, plan, self.run.dictionary))
        whole = plan.students["repaired"].kl[0]
        notes = [note for stage in plan.stages for note in stage.notes]
        notes += [branch_line(at, whole) for at in plan.branches]
        notes += needle_lines(self.table)
        parts.append([f"- {note}" for note in some_of([*notes, *plan.notes])])
        if self.checkpoint is not None:
            parts.append([f'next: mismatch generate {self.checkpoint} "Once upon a time"'])
        return "\n\n".join("\n".join(lines) for lines in parts if lines)

    def _stage_lines(self) -> list[str]:
        lines = []
        for row, stage in zip(self.stages.itertuples(), self.plan.stages, strict=True):
            line = f"{row.stage:12}  KL {row.kl:.4f} {band(row.lo, row.hi, NATS)} nats"
            if row.Index:
                line += (
                    f"   gap closed {100 * row.gap_closed:5.1f} % "
                    f"{band(100 * row.gap_lo, 100 * row.gap_hi, '{:.1f}'.format)}"
                    f"   {row.tokens:,} tokens   {row.seconds:.0f} s"
                )
            line += f"   {stage.retrieval_words}" if stage.retrieval_words else ""
            lines.append(line + ("" if row.kept else "   undone: it got worse"))
        return lines

    def _control_lines(self) -> list[str]:
        """Each control, and the repaired model minus it, paired."""
        lines = []
        for name, found in self.plan.students.items():
            if name in ("swap", "repaired"):
                continue
            (kl, lo, hi), (less, less_lo, less_hi) = found.kl, found.repaired_minus
            line = (
                f"{name:12}  KL {kl:.4f} {band(lo, hi, NATS)} nats   control; repaired minus it "
                f"{less:+.4f} {band(less_lo, less_hi, '{:+.4f}'.format)}"
            )
            worse = side(less_lo, less_hi) in ("open", "above")
            lines.append(line + ("   no better than it" if worse else ""))
        return lines
