"""What a plan returns: the swap to go on with, what it should cost and what it does cost. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from mismatch.stages.base import Result
from mismatch.stages.plan.figure import plan_data, plan_figure
from mismatch.stages.plan.words import plan_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Planned(Result):
    """One finished plan."""

    @property
    def swap(self) -> str:
        """The choice as a swap text."""
        return str(self.plan.swap)

    @property
    def costs(self) -> pd.DataFrame:
        """Each layer alone, their sum, all together, and the controls, on each task."""
        return plan_data(self.run.table)

    def words(self) -> str:
        model = str(self.run.manifest.get("model", "MODEL"))
        path = None if self.run_dir is None else str(self.run_dir)
        return plan_summary(self.run.table, self.plan, model, path)

    def as_dict(self) -> dict[str, Any]:
        costs = json.loads(self.costs.to_json(orient="records"))
        return super().as_dict() | {"swap": self.swap, "costs": costs}

    def figure(self, **options: Any) -> Figure:
        """Each layer alone, their sum, all together, and the controls."""
        return plan_figure(self.run.table, plan=self.plan, **options)
