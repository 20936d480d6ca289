"""A figure of a report: what draws it, what gives its numbers, how to read it, and which views of it there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from mismatch.errors import UsageError
from mismatch.report import readout, style
from mismatch.report.page import Html
from mismatch.runs.folder import Run


def _one_view(_run: Run) -> Mapping[str, Mapping[str, Any]]:
    return {}


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
        views: other views, to be chosen in the page: from a run, by label, more keywords of `function`.
        first: label of the view that is shown first, and that is written into figures/.
    """

    name: str
    title: str
    function: Callable[..., Figure]
    numbers: Callable[..., pd.DataFrame]
    reading: str
    views: Callable[[Run], Mapping[str, Mapping[str, Any]]] = _one_view
    first: str = "at a glance"

    def draw(self, run: Run, **options: Any) -> Figure:
        return self.function(run.table, plan=run.plan, dictionary=run.dictionary, **options)

    def data(self, run: Run) -> pd.DataFrame:
        return self.numbers(run.table, plan=run.plan, dictionary=run.dictionary)


@dataclass(frozen=True)
class Drawn:
    """A figure inside a page: its views by label; or, without any, why the table does not allow it."""

    views: tuple[tuple[str, Html], ...]
    missing: str = ""


LARGEST = 1e100
"""No scale reaches further: weights that were damaged can give such numbers, and an infinite KL."""


def extremes(table: pd.DataFrame) -> int:
    """How many numbers of a table no figure can show."""
    return int((table["value"].abs() > LARGEST).sum())


def draw_all(
    run: Run, figures: Iterable[ReportFigure], folder: Path | None = None
) -> dict[str, Drawn]:
    """Draw the figures of a run for its page; in a folder, also as png, svg, csv and json.

    Raises:
        RunError: a file cannot be written.
    """
    return {one.name: _draw(run, one, folder) for one in figures}


def _draw(run: Run, one: ReportFigure, folder: Path | None) -> Drawn:
    try:
        return _every_view(run, one, folder)
    except (ValueError, OverflowError) as error:
        if (extreme := extremes(run.table)) == 0:
            raise
        return Drawn(
            (), f"{extreme} numbers of the table are infinite or beyond {LARGEST:g} ({error})"
        )


def _every_view(run: Run, one: ReportFigure, folder: Path | None) -> Drawn:
    try:
        figure, data = one.draw(run), one.data(run)
    except UsageError as missing:
        return Drawn((), missing.message)
    if folder is not None:
        made = {
            "title": one.title,
            "reading": one.reading,
            "run_id": run.run_id,
            "from": "metrics.parquet",
            "by": f"{one.function.__module__}.{one.function.__name__}",
            "versions": run.manifest.get("versions", {}),
        }
        style.save(figure, folder, one.name, data, made)
    others = one.views(run)
    title = f"{one.title}: {one.first}" if others else one.title
    views = [(one.first, inline(figure, one.name, title))]
    for at, (label, options) in enumerate(others.items(), 1):
        view = inline(one.draw(run, **options), f"{one.name}-{at}", f"{one.title}: {label}")
        views.append((label, view))
    return Drawn(tuple(views))


def inline(figure: Figure, prefix: str, label: str) -> Html:
    """A figure as an element of a page, with what its marks read out.

    Args:
        figure: drawn.
        prefix: of its ids, once in a page.
        label: what it shows, for those who cannot see it.
    """
    svg = style.to_bytes(figure, "svg", as_text=True)
    return readout.inline(svg, prefix, label, readout.texts_of(figure))
