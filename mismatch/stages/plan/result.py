"""What a plan gives back: the swap to go on with, what it should cost and what it does cost. No torch."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mismatch.runs.folder import Run
from mismatch.stages.plan.figure import plan_data, plan_figure
from mismatch.stages.plan.words import plan_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Planned:
    """One finished plan, in memory or in a run folder."""

    run: Run

    @property
    def swap(self) -> str:
        """The choice as a swap text."""
        return self.plan["swap"]

    @property
    def plan(self) -> dict[str, Any]:
        """The choice, how it was made, and its budgets."""
        return self.run.plan

    @property
    def table(self) -> pd.DataFrame:
        """The long table: one number a row (see `mismatch.runs.table` and `mismatch.stages.plan.measured`)."""
        return self.run.table

    @property
    def costs(self) -> pd.DataFrame:
        """Each layer alone, their sum, all together, and the controls, on each task."""
        return plan_data(self.run.table)

    @property
    def run_dir(self) -> Path | None:
        """The run folder; None when nothing was written."""
        return self.run.path

    def summary(self) -> str:
        """What `mismatch plan` prints at the end."""
        return plan_summary(self.run.table, self.plan, str(self.run.manifest.get("model", "MODEL")))

    def figure(self, **options: Any) -> Figure:
        """Each layer alone, their sum, all together, and the controls."""
        plan = {"model": self.run.manifest.get("model")} | self.plan
        return plan_figure(self.run.table, plan=plan, **options)

    def __repr__(self) -> str:
        where = "" if self.run_dir is None else f", {self.run_dir}"
        return f"Planned({self.swap!r}{where})"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"
