"""A plan in a picture and in words: its layers one at a time, added up, together, and the control in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from mismatch.errors import UsageError
from mismatch.report import style
from mismatch.stages.scan.atlas import PANELS, Panel
from mismatch.stages.scan.words import can_do, teacher_words

KINDS = ("part", "sum", "together", "control")
_COLOURS = {"part": style.FAINT, "sum": "#0072b2", "together": "#d55e00", "control": "#009e73"}
_MARKS = {"part": "o", "sum": "D", "together": "s", "control": "^"}


def plan_data(
    table: pd.DataFrame,
    *,
    plan: Mapping[str, Any] | None = None,
    dictionary: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """What each part, their sum, the whole and its controls cost on each task; larger is worse.

    Args:
        table: the long table of a plan.
        plan, dictionary: not needed; as the other figures take them.

    Returns:
        Rows task, unit, kind (one of `KINDS`), name, layer, value, lo, hi, n.

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
    columns = ["task", "unit", "kind", "name", "layer", "value", "lo", "hi", "n"]
    return data[columns].reset_index(drop=True)


@style.styled
def plan_figure(
    table: pd.DataFrame,
    *,
    plan: Mapping[str, Any] | None = None,
    dictionary: Mapping[str, Any] | None = None,
    width: float = style.WIDTH,
) -> Figure:
    """Draw a dot and an interval for each layer alone, for their sum, for all together and for the control.

    Args:
        table: the long table of a plan.
        plan: the run's plan.json.
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
    swap, model = ((plan or {}).get(name) for name in ("swap", "model"))
    style.frame(
        figure,
        f"{swap or 'the choice'}: together, and one layer at a time"
        + (f" ({model})" if model else ""),
        "Dots with 95 % intervals, on text and keys that chose nothing. Sum: the layers alone, added up; where "
        "`together` is to its right, the damage is more than the sum of its parts. "
        f"Run {' '.join(table['run_id'].unique())}.",
    )
    return figure


def _dots(ax: Axes, data: pd.DataFrame, panel: Panel) -> None:
    one = data.loc[data["kind"] == "part", "name"].nunique() == 1
    names = [_label(row, one) for row in data.itertuples()]
    for at, row in enumerate(data.itertuples()):
        colour = _COLOURS[row.kind]
        if pd.notna(row.lo):
            ax.plot([row.lo, row.hi], [at, at], color=colour, lw=1.2, solid_capstyle="butt")
        ax.plot(row.value, at, marker=_MARKS[row.kind], ms=4, color=colour, ls="")
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
    short = {"text": "KL", "induction": "induction lost", "passkey": "passkey lost"}[panel.task]
    ax.set_title(short, fontweight="bold")
    ax.set_xlabel(panel.unit)


def _label(row: Any, one_mechanism: bool) -> str:
    if row.kind == "part":
        named = not one_mechanism and len(row.name) < 22
        return f"layer {row.layer} {row.name}" if named else f"layer {row.layer}"
    return {"sum": "sum of these", "together": "together"}.get(row.kind, f"{row.name}, together")


def plan_summary(table: pd.DataFrame, plan: Mapping[str, Any], model: str = "MODEL") -> str:
    """The end of `mismatch plan` in a terminal; readable without colour.

    Args:
        table: the long table of a plan.
        plan: the run's plan.json.
        model: for the next command.
    """
    data = plan_data(table)
    chosen = sum(len(layers) for layers in plan.get("choice", {}).values())
    parts = [f"warning: {note}" for note in plan.get("notes", ())]
    parts.append(f"{plan['swap']}   ({chosen} of {plan['n_layers']} layers, {plan['method']})")
    parts += _steps(plan)
    for panel in PANELS:
        here = data[data["task"] == panel.task]
        if here.empty:
            continue
        parts += ["", f"{panel.title}, {panel.unit}{teacher_words(table, panel)}"]
        if not can_do(table, panel.task, plan):
            parts.append("  the original itself cannot do this: nothing follows from these numbers")
        parts += _judged(table, panel, here)
    parts += ["", f'next: mismatch trace --model {model} --swap "{plan["swap"]}"']
    return "\n".join(parts)


def _steps(plan: Mapping[str, Any]) -> list[str]:
    lines = []
    for at, step in enumerate(plan.get("steps", ()), 1):
        lines.append(
            f"  step {at}: layer {step['layer']} {step['mechanism']}; all so far "
            f"{style.interval(step['kl'], step['lo'], step['hi'])}"
        )
    said = plan.get("predicted_by_scan")
    if said:
        lines.append(f"  the scan that chose them said {style.number(said['kl'])} in sum")
    return lines


def _judged(table: pd.DataFrame, panel: Panel, here: pd.DataFrame) -> list[str]:
    one = {row.kind: row for row in here.itertuples() if row.kind in ("sum", "together")}
    lines = []
    for kind, words in (
        ("sum", "predicted, one at a time added up"),
        ("together", "measured, together"),
    ):
        row = one[kind]
        lines.append(f"  {words:<34}{style.interval(row.value, row.lo, row.hi)}")
    stat = "lost_minus_sum" if panel.signed else "mean_minus_sum"
    rest = table[(table["metric"] == panel.metric) & (table["stat"] == stat)].iloc[0]
    lines.append(
        f"  {'measured - predicted':<34}{style.interval(rest['value'], rest['lo'], rest['hi'])}"
        f"   {_verdict(rest, one['sum'].value, one['together'].value)}"
    )
    for row in here[here["kind"] == "control"].itertuples():
        lines.append(
            f"  {row.name + ' in the same places':<34}{style.interval(row.value, row.lo, row.hi)}"
        )
    return lines


def _verdict(rest: pd.Series, apart: float, together: float) -> str:
    if pd.isna(rest["lo"]):
        return ""
    if rest["lo"] <= 0 <= rest["hi"]:
        return "costs add up, as far as this shows"
    times = f" ({style.number(together / apart)} times)" if apart > 0 and together > 0 else ""
    return ("more" if rest["lo"] > 0 else "less") + f" than the sum of its parts{times}"
