"""A plan in a picture: its layers one at a time, added up, together, and the control in the same layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from mismatch.errors import UsageError
from mismatch.report import intervals, readout, style
from mismatch.stages.plan.plan import ChoicePlan
from mismatch.stages.scan.damage import PANELS, Panel

KINDS = ("part", "sum", "together", "control")
_COLOURS = {"part": style.FAINT, "sum": "#0072b2", "together": "#d55e00", "control": "#009e73"}
_MARKS = {"part": "o", "sum": "D", "together": "s", "control": "^"}


def plan_data(
    table: pd.DataFrame,
    *,
    plan: ChoicePlan | None = None,
    dictionary: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """What each part, their sum, the whole and its controls cost on each task; larger is worse.

    Args:
        table: the long table of a plan.
        plan, dictionary: not needed; as the other figures take them.

    Returns:
        Rows task, unit, kind (one of `KINDS`), name, layer, value, lo, hi, over, n.

    Raises:
        UsageError: the table is not that of a plan.
    """
    rows = table[(table["stage"] == "plan") & (table["position"] == "all")]
    found = []
    for panel in PANELS:
        mine = rows[rows["metric"] == panel.metric]
        damage = mine[mine["stat"] == panel.stat]
        total = mine[mine["stat"] == ("lost_sum_of_parts" if panel.signed else "sum_of_parts")]
        kinds = damage["layer"].notna().map({True: "part", False: "control"})
        kinds = kinds.mask(damage["student"] == "swap", "together")
        damage = damage.assign(kind=kinds)
        if panel.sign < 0:
            damage = damage.assign(value=-damage["value"], lo=-damage["hi"], hi=-damage["lo"])
        here = pd.concat([damage, total.assign(kind="sum")])
        here = here.assign(task=panel.task, unit=panel.unit, name=here["student"])
        found.append(here)
    data = pd.concat(found, ignore_index=True)
    if data.empty:
        raise UsageError("the table holds no plan", hint="make one by `mismatch plan`")
    data["value"] += 0.0  # no negative zero
    order = data["kind"].map({kind: at for at, kind in enumerate(KINDS)})
    tasks = data["task"].map({panel.task: at for at, panel in enumerate(PANELS)})
    data = data.assign(order=order, at=tasks).sort_values(["at", "order", "layer", "name"])
    columns = ["task", "unit", "kind", "name", "layer", "value", "lo", "hi", "over", "n"]
    return data[columns].reset_index(drop=True)


@style.styled
def plan_figure(
    table: pd.DataFrame,
    *,
    plan: ChoicePlan | None = None,
    dictionary: Mapping[str, Any] | None = None,
    width: float = style.WIDTH,
) -> Figure:
    """Draw a dot and an interval for each layer alone, for their sum, for all together and for the control.

    Args:
        table: the long table of a plan.
        plan: of the run.
        dictionary: not needed; as the other figures take it.
        width: of the figure, in inches.

    Raises:
        UsageError: the table is not that of a plan.
    """
    data = plan_data(table, dictionary=dictionary)
    panels = [panel for panel in PANELS if panel.task in set(data["task"])]
    rows = int(data.groupby("task").size().max())
    figure = style.new_figure(width, 1.25 + 0.17 * rows)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _dots(axis, data[data["task"] == panel.task], panel)
    swap, model = (None, None) if plan is None else (plan.swap, plan.model)
    style.frame(
        figure,
        f"{swap or 'the choice'}: together, and one layer at a time"
        + (f" ({model})" if model else ""),
        f"On text and keys that chose nothing; whiskers: {intervals.named(data['over'])}. Sum: the layers alone, "
        "added up; where `together` is to its right, the damage is more than the sum of its parts. "
        f"Run {' '.join(table['run_id'].unique())}.",
    )
    return figure


def _dots(ax: Axes, data: pd.DataFrame, panel: Panel) -> None:
    one = data.loc[data["kind"] == "part", "name"].nunique() == 1
    names = [_label(row, one) for row in data.itertuples()]
    numbers = [style.interval(row.value, row.lo, row.hi) for row in data.itertuples()]
    whole = {
        name: text
        for name, text, kind in zip(names, numbers, data["kind"], strict=True)
        if kind != "part"
    }
    for at, row in enumerate(data.itertuples()):
        colour = _COLOURS[row.kind]
        if pd.notna(row.lo):
            ax.plot([row.lo, row.hi], [at, at], color=colour, lw=1.2, solid_capstyle="butt")
        (dot,) = ax.plot(row.value, at, marker=_MARKS[row.kind], ms=4, color=colour, ls="")
        others = {name: text for name, text in whole.items() if name != names[at]}
        text = readout.lines(names[at], {panel.unit: numbers[at], **others})
        readout.read_out(dot, f"dot-{panel.task}-{at}", [text])
    values = data["value"][np.isfinite(data["value"])]
    if not panel.signed and len(values) and values.min() > 0 and values.max() > 20 * values.min():
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    if panel.signed:
        ax.axvline(0, color=style.FAINT, lw=0.5)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="x", lw=0.3, color="#dddddd")
    ax.set_axisbelow(True)
    short = "KL" if panel.task == "text" else f"{panel.task} lost"
    ax.set_title(short, fontweight="bold")
    ax.set_xlabel(panel.unit)


def _label(row: Any, one_mechanism: bool) -> str:
    if row.kind == "part":
        named = not one_mechanism and len(row.name) < 22
        return f"layer {row.layer} {row.name}" if named else f"layer {row.layer}"
    return {"sum": "sum of these", "together": "together"}.get(row.kind, f"{row.name}, together")
