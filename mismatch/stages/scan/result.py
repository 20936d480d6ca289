"""What a scan returns: the table, the atlas, and a summary. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from mismatch.stages.base import Result
from mismatch.stages.scan.atlas import atlas, atlas_data
from mismatch.stages.scan.words import scan_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mismatch.stages.scan.sums import Sums


@dataclass(frozen=True, repr=False)
class Scanned(Result):
    """One finished scan."""

    sums: Sums | None = field(default=None, repr=False)
    """The sums per document, where the scan ran in this process."""

    @property
    def cells(self) -> pd.DataFrame:
        """Layer x mechanism x task: the damage of each, with its interval and its kind."""
        return atlas_data(self.run.table)

    @property
    def finite(self) -> bool:
        """Whether every activation of every cell was a number."""
        return not self.run.manifest.get("not_finite")

    def words(self) -> str:
        return scan_summary(self.run.table, self.run.plan)

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"cells": json.loads(self.cells.to_json(orient="records"))}

    def atlas(self, **options: Any) -> Figure:
        """Layers x mechanisms, one panel a task, side by side."""
        return atlas(self.run.table, plan=self.plan, **options)
