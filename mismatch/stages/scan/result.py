"""What a scan gives back: the table, the atlas, and a summary. No torch."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mismatch.runs.folder import Run
from mismatch.stages.scan.atlas import atlas, atlas_data
from mismatch.stages.scan.words import scan_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mismatch.stages.scan.sums import Sums


@dataclass(frozen=True)
class Scanned:
    """One finished scan, in memory or in a run folder."""

    run: Run
    sums: Sums | None = field(default=None, repr=False)
    """The sums per document, where the scan ran in this process."""

    @property
    def table(self) -> pd.DataFrame:
        """The long table: one number a row (see `mismatch.runs.table` and `mismatch.stages.scan.sums`)."""
        return self.run.table

    @property
    def run_dir(self) -> Path | None:
        """The run folder; None when nothing was written."""
        return self.run.path

    @property
    def cells(self) -> pd.DataFrame:
        """Layer x mechanism x task: the damage of each, with its interval and its kind."""
        return atlas_data(self.run.table)

    @property
    def finite(self) -> bool:
        """Whether every activation of every cell was a number."""
        return not self.run.manifest.get("not_finite")

    def summary(self) -> str:
        """What `mismatch scan` prints at the end."""
        return scan_summary(self.run.table, self.run.plan)

    def atlas(self, **options: Any) -> Figure:
        """Layers x mechanisms, one panel a task, side by side."""
        plan = {"model": self.run.manifest.get("model")} | self.run.plan
        return atlas(self.run.table, plan=plan, **options)

    def __repr__(self) -> str:
        where = "" if self.run_dir is None else f", {self.run_dir}"
        return f"Scanned({self.run.run_id}, {len(self.table)} numbers{where})"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"
