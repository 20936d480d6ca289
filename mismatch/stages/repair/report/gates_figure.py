"""Where each head's gate went while it was trained: a gate that never left its start was not trained at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mismatch.errors import UsageError
from mismatch.report import readout, style
from mismatch.stages.repair.config import SWAPPED
from mismatch.stages.repair.plan import RepairPlan
from mismatch.stages.repair.report.curve_figure import STAGE_COLOURS

PANELS = 6
"""Gate tensors that are drawn; all of them are in the numbers."""

MOST = 800
"""Points of a panel that read out their numbers; a panel with more is a picture only, its numbers are in the csv."""

COLUMNS = ("gate", "branch", "head", "stage", "what", "at", "step", "raw", "value")
STILL = 0.06  # of the width: what a stage without steps takes


def gates_data(_table: pd.DataFrame, *, plan: RepairPlan, dictionary: Any = None) -> pd.DataFrame:
    """Every gate of every head over the repair.

    Returns:
        Rows gate, branch, head, stage, what (start: as swapped; look; end: the weights that the stage left), at (where
        it is drawn: steps of all stages so far), step (of the stage), raw (the parameter), value (its sigmoid where it
        weighs a branch, else as it is).

    Raises:
        UsageError: there is no gate, or nothing was noted of it.
    """
    weighs = plan.gates.weighs
    rows: list[dict[str, Any]] = []

    def note(gates: Mapping[str, Any], stage: str, what: str, at: float, step: int) -> None:
        for name, numbers in gates.items():
            for head, raw in enumerate(numbers):
                value = 1 / (1 + math.exp(-raw)) if name in weighs else raw
                given = (name, weighs.get(name, ""), head, stage, what, at, step, raw, value)
                rows.append(dict(zip(COLUMNS, given, strict=True)))

    note(plan.gates.start, SWAPPED, "start", 0, 0)
    drawn = set(plan.gates.start)
    for stage, (left, right) in zip(plan.stages, _spans(plan), strict=True):
        for look in stage.looks:
            share = look.step / max(1, stage.steps)
            at = left + share * (right - left)
            note(look.gates, stage.name, "look", at, look.step)
        # A stage that was undone left the weights from before it; the next one begins there.
        if stage.kept:
            ends = {name: pair[1] for name, pair in stage.gates.items() if name in drawn}
            note(ends, stage.name, "end", right, stage.steps)
    if not rows:
        raise UsageError("not applicable: no swapped module has a gate")
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _spans(plan: RepairPlan) -> list[tuple[float, float]]:
    """From where to where each stage is drawn, in steps; one without steps gets a little room all the same."""
    steps = [stage.steps for stage in plan.stages]
    room = STILL * (sum(steps) or 1)
    spans, at = [], 0.0
    for stage, count in zip(plan.stages, steps, strict=True):
        wide = count or (room if stage.tokens else 0.0)
        spans.append((at, at + wide))
        at += wide
    return spans


@style.styled
def gates_figure(_table: pd.DataFrame, *, plan: RepairPlan, dictionary: Any = None) -> Figure:
    """A panel per gate, a line per head, from the swap to the end of the ladder; coloured bands are its stages.

    Raises:
        UsageError: there is no gate.
    """
    data = gates_data(_table, plan=plan)
    names = list(dict.fromkeys(data["gate"]))
    shown = names[:PANELS]
    figure = style.new_figure(style.WIDTH, 0.8 + 1.75 * len(shown))
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for at, (axis, name) in enumerate(zip(axes, shown, strict=True)):
        mine = data[data["gate"] == name]
        _panel(axis, mine, plan)
        if len(mine) <= MOST:
            _read_out(axis, mine, f"gate-{at}")
    _name_stages(axes[0], plan)
    axes[-1].set_xlabel("steps of all stages so far")
    left_out = (
        f" {len(names) - len(shown)} more gates are in the numbers." if names[PANELS:] else ""
    )
    style.frame(
        figure,
        "Gates while they were trained, one line a head",
        "Points: evaluations on the validation text. Dot: what a stage left, which is its best one. Bands: stages; "
        f"hatched: undone. Dotted: where a head began. Numbers at the right: heads.{left_out}",
    )
    for axis, name in zip(axes, shown, strict=True):
        _name_heads(axis, data[data["gate"] == name])
    return figure


def _panel(ax: Axes, data: pd.DataFrame, plan: RepairPlan) -> None:
    heads = sorted(data["head"].unique())
    branch = data["branch"].iloc[0]
    for stage, (left, right) in zip(plan.stages, _spans(plan), strict=True):
        if right > left:
            ax.axvspan(left, right, color=STAGE_COLOURS[stage.name], alpha=0.10, lw=0, zorder=0)
            if not stage.kept:
                ax.axvspan(left, right, fill=False, hatch="///", ec="#b5b5b5", lw=0, zorder=0)
    for head in heads:
        rows, colour = data[data["head"] == head], _colour(head, len(heads))
        start = rows[rows["what"] == "start"]
        if len(start):
            ax.axhline(start["value"].iloc[0], color=style.FAINT, lw=0.5, ls=":", zorder=1)
        ax.plot(rows["at"], rows["value"], color=colour, lw=0.9, zorder=2)
        looks, ends = rows[rows["what"] == "look"], rows[rows["what"] == "end"]
        ax.plot(
            looks["at"],
            looks["value"],
            color=colour,
            ls="none",
            marker=".",
            ms=3,
            zorder=3,
            label=f"look-{head}",
        )
        ax.plot(
            ends["at"],
            ends["value"],
            color=colour,
            ls="none",
            marker="o",
            ms=3.5,
            zorder=4,
            label=f"end-{head}",
        )
    style.panel_title(ax, data["gate"].iloc[0])
    ax.set_ylabel(f"weight of {branch}" if branch else "value")
    if branch:
        low, high = data["value"].min(), data["value"].max()
        ax.set_ylim(max(0.0, low - 0.05), min(1.0, high + 0.05))
    ax.set_xlim(0, max(float(data["at"].max()), 1.0))


def _read_out(ax: Axes, data: pd.DataFrame, name: str) -> None:
    """What each point reads out: the head, the stage and its step, the gate, and where it began."""
    start = data[data["what"] == "start"].set_index("head")["value"]
    drawn = {line.get_label(): line for line in ax.get_lines()}
    for (what, head), rows in data[data["what"] != "start"].groupby(["what", "head"]):
        texts = [
            readout.lines(
                f"head {head}, {row.stage}, step {row.step}",
                {
                    f"weight of {row.branch}" if row.branch else "value": style.number(row.value),
                    "parameter": style.number(row.raw),
                    "at the start": style.number(start.get(head)),
                },
            )
            for row in rows.itertuples()
        ]
        readout.read_out(drawn[f"{what}-{head}"], f"{name}-{what}-{head}", texts)


def _name_stages(ax: Axes, plan: RepairPlan) -> None:
    spans = _spans(plan)
    whole = max((right for _, right in spans), default=1.0) or 1.0
    for stage, (left, right) in zip(plan.stages, spans, strict=True):
        if (right - left) / whole >= 1.5 * STILL:
            ax.annotate(
                stage.name, ((left + right) / 2, 1.0), xycoords=("data", "axes fraction"),
                xytext=(0, -8), textcoords="offset points", ha="center", fontsize=6.5,
                color=style.INK,
            )  # fmt: skip


def _name_heads(ax: Axes, data: pd.DataFrame) -> None:
    last = data.groupby("head").tail(1)
    count = data["head"].nunique()
    if count > 1:
        ends = [(r.at, r.value, str(r.head), _colour(r.head, count)) for r in last.itertuples()]
        style.label_ends(ax, ends)


def _colour(head: int, count: int) -> Any:
    return mpl.colormaps["viridis"](
        0.9 * head / max(1, count - 1) if count > 1 else np.float64(0.0)
    )
