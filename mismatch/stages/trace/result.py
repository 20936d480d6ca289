"""What a trace gives back: the table, the findings, and pictures of them. No torch."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mismatch.report.heatmap import heatmap
from mismatch.runs.files import write_atomic
from mismatch.runs.folder import Run
from mismatch.stages import reporting
from mismatch.stages.probe.passkey_figure import passkey
from mismatch.stages.probe.words import answer_lines, headlines, probe_summary
from mismatch.stages.trace.findings import Finding
from mismatch.stages.trace.report.position_figure import by_position
from mismatch.stages.trace.report.profile_figure import depth_profile
from mismatch.stages.trace.report.words import summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Probed:
    """The answers of one run of probes, in memory or in a run folder."""

    run: Run

    @property
    def table(self) -> pd.DataFrame:
        """The long table: one number a row (see `mismatch.runs.table`)."""
        return self.run.table

    @property
    def plan(self) -> dict[str, Any]:
        """What was replaced, inherited, new and dropped."""
        return self.run.plan

    @property
    def run_dir(self) -> Path | None:
        """The run folder; None when nothing was written."""
        return self.run.path

    @property
    def headlines(self) -> pd.DataFrame:
        """The headline of every probe: teacher, each student, and their paired difference."""
        return headlines(self.table, self.run.dictionary)

    def summary(self) -> str:
        """What `mismatch probe` prints at the end."""
        return probe_summary(self.table, self.plan, self.run.dictionary)

    def passkey(self, **options: Any) -> Figure:
        """Retrieval over length and depth; see `mismatch.stages.probe.passkey_figure`."""
        return passkey(self.table, plan=self.plan, dictionary=self.run.dictionary, **options)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"


@dataclass(frozen=True)
class Result:
    """One finished trace, in memory or in a run folder."""

    run: Run
    findings: list[Finding]

    @property
    def table(self) -> pd.DataFrame:
        """The long table: one number a row (see `mismatch.runs.table`)."""
        return self.run.table

    @property
    def plan(self) -> dict[str, Any]:
        """What was replaced, inherited, new and dropped."""
        return self.run.plan

    @property
    def run_dir(self) -> Path | None:
        """The run folder; None when nothing was written."""
        return self.run.path

    def summary(self) -> str:
        """What `mismatch trace` prints at the end."""
        found = [finding.as_dict() for finding in self.findings]
        text = summary(self.table, self.plan, found, dictionary=self.run.dictionary)
        lines = [text, *answer_lines(self.table, self.run.dictionary)]
        if self.run_dir is not None and any(c["layer"] is not None for c in self.plan["clauses"]):
            lines += ["", f"next: mismatch diagnose {self.run_dir}   # why, and what would mend it"]
        return "\n".join(lines)

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

    def __repr__(self) -> str:
        where = "" if self.run_dir is None else f", {self.run_dir}"
        return f"Result({self.run.run_id}, {len(self.table)} numbers, {len(self.findings)} findings{where})"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"
