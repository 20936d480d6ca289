"""What a diagnosis returns: the numbers, the words, the picture. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from mismatch.stages.base import Result
from mismatch.stages.diagnose.figure import diagnosis_data, diagnosis_figure
from mismatch.stages.diagnose.numbers import Found
from mismatch.stages.diagnose.verdict import headline
from mismatch.stages.diagnose.words import diagnosis_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Diagnosed(Result):
    """One finished diagnosis."""

    @property
    def found(self) -> Found:
        """All numbers."""
        found: Found = self.plan.diagnosis
        return found

    @property
    def verdict(self) -> str:
        """One sentence."""
        return headline(self.found)

    @property
    def leading(self) -> str | None:
        """The simplest correction that recovers nearly as much as any; None: none recovers much."""
        return self.found.leading

    @property
    def shares(self) -> pd.DataFrame:
        """What is drawn: a row for each cause and each correction."""
        return diagnosis_data(self.run.table, plan=self.run.plan)

    def words(self) -> str:
        return "\n".join([self.verdict, "", diagnosis_summary(self.run.plan, self.run.findings)])

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {
            "verdict": self.verdict,
            "diagnosis": asdict(self.found),
            "findings": self.run.findings,
        }

    def figure(self, **options: Any) -> Figure:
        """The share of the damage that each correction recovers, by cause."""
        return diagnosis_figure(self.run.table, plan=self.run.plan, **options)

    def __repr__(self) -> str:
        where = "" if self.run_dir is None else f", {self.run_dir}"
        return f"Diagnosed({self.found.swap!r}, leading={self.leading!r}{where})"
