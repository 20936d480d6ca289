"""What the shift heatmap shows and reads out: which metrics there are along the layers, and a text for each cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from mismatch.report import quantity as q
from mismatch.report import readout, style
from mismatch.report.quantity import Quantity

PANELS = ("rel_l2", "cka_minibatch", "norm_ratio")
"""The metrics of the default figure, of those that the table has."""

MOST = 2000
"""Cells of all views of a page together: 13 metrics of 30 layers, 5 of 80; a page stays below 1.5 MB."""


def readouts(
    table: pd.DataFrame,
    cells: pd.DataFrame,
    quantity: Quantity,
    mode: str = "free",
    stage: str = "surgery",
    beside: Mapping[str, pd.DataFrame] | None = None,
) -> list[str]:
    """What each cell reads out: its value, the floor, the controls at the same site and layer, and the local error.

    Args:
        table: the long table.
        cells: of one panel (`quantity.cells`).
        quantity: its metric.
        mode: free or forced.
        stage: surgery or repair.
        beside: other panels by name, whose cells at the same site and layer are named, too.
    """
    sites = list(cells["site"].unique())
    students = q.students(table)
    who = [*students, *cells["student"].unique()]
    rows = q.pick(table, quantity, student=who, site=sites, stage=stage, mode=None)
    rows = rows[rows["layer"].notna() & rows["head"].isna()]
    known = {(row.student, row.mode, row.site, int(row.layer)): row for row in rows.itertuples()}

    def number(at: tuple[str, str, str, int]) -> str:
        return style.number(known[at].value) if at in known else ""

    others = {
        name: {
            (row.site, int(row.layer)): style.interval(row.value, row.lo, row.hi)
            for row in panel[panel["kind"] != "missing"].itertuples()
        }
        for name, panel in (beside or {}).items()
    }

    def text(cell: Any) -> str:
        if cell.kind == "missing":
            return ""
        at = (cell.site, int(cell.layer))
        said = {
            quantity.metric: style.interval(cell.value, cell.lo, cell.hi),
            "floor": "" if pd.isna(cell.floor) else style.number(cell.floor),
            **{readout.called(s): number((s, mode, *at)) for s in students if s != cell.student},
            **{name: panel.get(at, "") for name, panel in others.items()},
        }
        if mode != "forced":
            said["on the teacher's input"] = number((cell.student, "forced", *at))
        swapped = ", swapped" if cell.swapped else ""
        return readout.lines(f"{cell.student}, layer {cell.layer}{swapped}, {cell.site}", said)

    return [text(cell) for cell in cells.itertuples()]


def views(
    table: pd.DataFrame, dictionary: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """A view for each metric along the layers that is not in `PANELS`, as keywords of `heatmap` by label.

    A page holds at most `MOST` of their cells; metrics beyond that are left to the table.
    """
    each = max(1, len(q.BLOCK_SITES) * q.layer_count(table))
    others = [m for m in every_metric(table, dictionary) if m not in PANELS][: MOST // each]
    return {q.quantity(metric, dictionary).label: {"metric": metric} for metric in others}


def every_metric(table: pd.DataFrame, dictionary: Mapping[str, Any] | None = None) -> list[str]:
    """The metrics that the swap has along the layers: those of `PANELS` first, then in the order of the table."""
    along = table["layer"].notna() & table["site"].isin(q.BLOCK_SITES) & table["head"].isna()
    names = list(dict.fromkeys(table.loc[along, "metric"]))
    where = {"student": "swap", "mode": "free", "site": list(q.BLOCK_SITES)}
    names = [m for m in names if q.has(table, q.quantity(m, dictionary), **where)]
    return sorted(names, key=lambda m: PANELS.index(m) if m in PANELS else len(PANELS))
