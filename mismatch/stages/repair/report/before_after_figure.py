"""Before and after a repair: the shift of the swap and of the repaired model at every site, on one scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from mismatch.errors import UsageError
from mismatch.report import heatmap, heatmap_cells, style
from mismatch.report import quantity as q
from mismatch.report.quantity import Quantity
from mismatch.runs.plan import SwapPlan

METRICS = ("rel_l2", "norm_ratio")
STAGES = {"surgery": "swap", "repair": "repaired"}
"""Stage of the table -> what stands at its panel."""


def before_after_data(
    table: pd.DataFrame, *, plan: SwapPlan | None = None, dictionary: Any = None
) -> pd.DataFrame:
    """The numbers of the picture, one cell a row; `stage` is surgery or repair.

    Raises:
        UsageError: the table holds no site of both.
    """
    found = [
        cells.assign(stage=stage).drop(columns="row")
        for _, pair in _pairs(table, dictionary)
        for stage, cells in pair.items()
    ]
    return pd.concat(found, ignore_index=True)


@style.styled
def before_after(
    table: pd.DataFrame,
    *,
    plan: SwapPlan | None = None,
    dictionary: Any = None,
    width: float = style.WIDTH,
) -> Figure:
    """A pair of panels per metric, the swap above the repaired model, both on the colours of one scale.

    Args:
        table: of a repair.
        plan: of the run; blocks behind the swap that were trained, too, are named in the caption.
        dictionary: the run's metrics.json.
        width: of the figure, in inches.

    Raises:
        UsageError: the table holds no site of both.
    """
    pairs = _pairs(table, dictionary)
    every = [cells for _, pair in pairs for cells in pair.values()]
    rows = every[0]["row"].nunique()
    figure = style.new_figure(width, 0.95 + len(every) * (0.42 + 0.15 * rows))
    axes = iter(figure.subplots(len(every), 1, sharex=True, squeeze=False)[:, 0])
    for quantity, pair in pairs:
        norm = heatmap.colour_norm(list(pair.values()), quantity.signed)
        for stage, cells in pair.items():
            title = f"{quantity.label}: {STAGES[stage]}"
            axis = next(axes)
            beside = {STAGES[other]: panel for other, panel in pair.items() if other != stage}
            texts = heatmap_cells.readouts(table, cells, quantity, stage=stage, beside=beside)
            heatmap.draw_panel(axis, cells, quantity, norm, title, texts)
    axis.set_xlabel("layer")
    style.frame(
        figure,
        "Shift against the teacher before and after the repair, one scale a metric",
        f"{heatmap.caption(table, every)} {_trained(plan)}",
    )
    return figure


def _pairs(
    table: pd.DataFrame, dictionary: Mapping[str, Any] | None
) -> list[tuple[Quantity, dict[str, pd.DataFrame]]]:
    """By metric, the cells of either stage."""
    found = []
    for metric in METRICS:
        quantity = q.quantity(metric, dictionary)
        where = {"student": "swap", "mode": "free", "site": list(q.BLOCK_SITES)}
        if all(q.has(table, quantity, stage=stage, **where) for stage in STAGES):
            cells = {s: q.cells(table, quantity, stage=s) for s in STAGES}
            found.append((quantity, {s: c.assign(row=c["site"]) for s, c in cells.items()}))
    if not found:
        raise UsageError(
            "the sites were not traced before and after", hint="mismatch repair --trace-tokens 2048"
        )
    return found


def _trained(plan: SwapPlan | None) -> str:
    """Which blocks behind the swap were trained, too."""
    clauses = () if plan is None else plan.clauses
    inside = [(c.layer, c.mechanism) for c in clauses if c.layer is not None]
    swapped = {layer for layer, mechanism in inside if mechanism != "lora"}
    behind = sorted({layer for layer, mechanism in inside if mechanism == "lora"} - swapped)
    if not behind:
        return ""
    if len(behind) == 1:
        return f"Block {behind[0]} was trained, too, through LoRA."
    return f"Blocks {behind[0]}-{behind[-1]} were trained, too, through LoRA."
