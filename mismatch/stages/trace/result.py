"""What a trace returns: the table, the findings, and pictures of them. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mismatch.report.heatmap import heatmap
from mismatch.runs.files import write_atomic
from mismatch.stages import reporting
from mismatch.stages.base import Result
from mismatch.stages.probe.words import answer_lines
from mismatch.stages.trace.report.position_figure import by_position
from mismatch.stages.trace.report.profile_figure import depth_profile
from mismatch.stages.trace.report.words import summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mismatch.surgery.operate import Student


@dataclass(frozen=True, repr=False)
class Traced(Result):
    """One finished trace. `swap` is the student, where it is still in memory."""

    swap: Student | None = None

    def words(self) -> str:
        text = summary(self.table, self.plan, self.run.findings, dictionary=self.run.dictionary)
        lines = [text, *answer_lines(self.table, self.run.dictionary)]
        if self.run_dir is not None and self.plan.layers:
            lines += [
                "",
                f"next: mismatch diagnose {self.run_dir}   # why, and what would repair it",
            ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"findings": self.run.findings}

    def heatmap(self, metric: Any = None, site: Any = None, **options: Any) -> Figure:
        """The shift of every layer and site; see `mismatch.report.heatmap`."""
        return heatmap(self.table, metric, site, dictionary=self.run.dictionary, **options)

    def depth_profile(self, **options: Any) -> Figure:
        """How the shift grows or heals behind the swap, beside its controls."""
        return depth_profile(self.table, dictionary=self.run.dictionary, **options)

    def by_position(self, **options: Any) -> Figure:
        """The output shift by token position."""
        return by_position(self.table, plan=self.plan, dictionary=self.run.dictionary, **options)

    def to_html(self, path: str | Path) -> Path:
        """Write the report: one self-contained file."""
        path = Path(path)
        write_atomic(path, lambda file: file.write(reporting.page(self.run).encode()))
        return path
