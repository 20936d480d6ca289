"""What a training returns: the looks, the students beside it, the checkpoint. No torch."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mismatch.report.intervals import band
from mismatch.report.words import count
from mismatch.stages.base import Result
from mismatch.stages.train.plan import TrainPlan
from mismatch.stages.train.report import curve, look_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mismatch.surgery.operate import Student

CHECKPOINT = "checkpoint"
"""The trained model, inside the run folder."""


@dataclass(frozen=True, repr=False)
class Trained(Result):
    """One finished training. `student` is the trained model, where it is still in memory."""

    student: Student | None = None

    @property
    def looks(self) -> pd.DataFrame:
        """A row per look: step, tokens, KL and NLL minus the teacher's, the shift of each layer, probes."""
        return look_table(self.plan)

    @property
    def checkpoint(self) -> Path | None:
        """The trained model as a Hugging Face folder."""
        return None if self.run.path is None else self.run.path / CHECKPOINT

    def as_dict(self) -> dict[str, Any]:
        rows = json.loads(self.looks.to_json(orient="records"))
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        students = {name: asdict(found) for name, found in self.plan.students.items()}
        return super().as_dict() | {"looks": rows, "students": students, "checkpoint": checkpoint}

    def curve(self) -> Figure:
        """KL against tokens, and the shift of each layer before and after."""
        return curve(self.table, plan=self.plan)

    def words(self) -> str:
        plan: TrainPlan = self.plan
        parts = [[f"warning: {text}" for text in plan.warnings]]
        kept = plan.kept
        lines = [
            f"{count(plan.parameters)} parameters trained, {kept.step:,} steps, {kept.tokens:,} tokens"
        ]
        for name, found in plan.students.items():
            (kl, lo, hi), (less, less_lo, less_hi) = found.kl, found.trained_minus
            line = f"{name:12}  KL {kl:.4f} {band(lo, hi, '{:.4f}'.format)} nats"
            if name != "trained":
                line += (
                    f"   trained minus it {less:+.4f} {band(less_lo, less_hi, '{:+.4f}'.format)}"
                )
            lines.append(line)
        parts += [lines, [f"- {note}" for note in plan.notes]]
        if self.checkpoint is not None:
            model, run = self.run.manifest["model"], shlex.quote(str(self.run.path))
            student = shlex.quote(str(self.checkpoint))
            parts.append(
                [f"next: mismatch trace --model {model} --student {student} --selected-by {run}"]
            )
        return "\n\n".join("\n".join(lines) for lines in parts if lines)
