"""What a diagnosis gives back: the numbers, the words, the picture. No torch."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mismatch.runs.folder import Run
from mismatch.stages.diagnose.figure import diagnosis_data, diagnosis_figure
from mismatch.stages.diagnose.numbers import Found
from mismatch.stages.diagnose.verdict import headline
from mismatch.stages.diagnose.words import diagnosis_summary
from mismatch.stages.trace.findings import Finding

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Diagnosed:
    """One finished diagnosis, in memory or in a run folder."""

    run: Run
    found: Found
    findings: list[Finding]

    @property
    def verdict(self) -> str:
        """One sentence."""
        return headline(self.found)

    @property
    def leading(self) -> str | None:
        """The simplest correction that returns nearly as much as any; None: none returns much."""
        return self.found.leading

    @property
    def table(self) -> pd.DataFrame:
        """The long table: one number a row (see `mismatch.runs.table` and `mismatch.stages.diagnose.rows`)."""
        return self.run.table

    @property
    def shares(self) -> pd.DataFrame:
        """What is drawn: a row for each cause and each correction."""
        return diagnosis_data(self.run.table, plan=self.run.plan)

    @property
    def run_dir(self) -> Path | None:
        """The run folder; None when nothing was written."""
        return self.run.path

    def summary(self) -> str:
        """What `mismatch diagnose` prints at the end."""
        said = [finding.as_dict() for finding in self.findings]
        return "\n".join([self.verdict, "", diagnosis_summary(self.run.plan, said)])

    def figure(self, **options: Any) -> Figure:
        """The share of the damage that each correction returns, by cause."""
        return diagnosis_figure(self.run.table, plan=self.run.plan, **options)

    def as_dict(self) -> dict[str, Any]:
        """What `mismatch diagnose --json` prints."""
        return {
            "run": None if self.run_dir is None else str(self.run_dir),
            "verdict": self.verdict,
            "diagnosis": self.found.as_dict(),
            "findings": [finding.as_dict() for finding in self.findings],
        }

    def __repr__(self) -> str:
        where = "" if self.run_dir is None else f", {self.run_dir}"
        return f"Diagnosed({self.found.swap!r}, leading={self.leading!r}{where})"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"
