"""A figure of a report: what draws it, what gives its numbers, and how to read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from mismatch.errors import UsageError
from mismatch.report import style
from mismatch.runs.folder import Run


@dataclass(frozen=True)
class ReportFigure:
    """One figure of a report.

    Attributes:
        name: of its files in figures/.
        title: above it.
        function: draws it; called as `function(table, plan=..., dictionary=...)`. It raises UsageError where the table
            does not allow the figure; the report then shows that sentence.
        numbers: the data in it, one number or cell a row; called in the same way.
        reading: how to read it; stands below it.
    """

    name: str
    title: str
    function: Callable[..., Figure]
    numbers: Callable[..., pd.DataFrame]
    reading: str

    def draw(self, run: Run) -> Figure:
        return self.function(run.table, plan=run.plan, dictionary=run.dictionary)

    def data(self, run: Run) -> pd.DataFrame:
        return self.numbers(run.table, plan=run.plan, dictionary=run.dictionary)


def draw_all(
    run: Run, figures: Iterable[ReportFigure], folder: Path | None = None
) -> dict[str, bytes | str]:
    """Draw the figures of a run; in a folder, also as png, svg, csv and json.

    Returns:
        For each figure, by name, its svg, or a sentence that tells why the table does not allow it.

    Raises:
        RunError: a file cannot be written.
    """
    drawn: dict[str, bytes | str] = {}
    for one in figures:
        try:
            figure, data = one.draw(run), one.data(run)
        except UsageError as missing:
            drawn[one.name] = missing.message
            continue
        if folder is None:
            drawn[one.name] = style.to_bytes(figure, "svg")
            continue
        made = {
            "title": one.title,
            "reading": one.reading,
            "run_id": run.run_id,
            "from": "metrics.parquet",
            "by": f"{one.function.__module__}.{one.function.__name__}",
            "versions": run.manifest.get("versions", {}),
        }
        drawn[one.name] = style.save(figure, folder, one.name, data, made)
    return drawn
