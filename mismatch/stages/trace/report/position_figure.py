"""The output shift by token position: KL in bins of positions, the swap against its controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from mismatch.report import intervals, readout, style
from mismatch.report import quantity as q
from mismatch.runs.plan import SwapPlan
from mismatch.runs.table import position_start

WIDE = 20
"""The y axis is logarithmic where one student lies more than so many times above another."""


def segments(plan: SwapPlan | None) -> list[int]:
    """The segment lengths of the swapped modules that have one."""
    clauses = () if plan is None else plan.clauses
    found = {clause.args.get("segment") for clause in clauses}
    return sorted(s for s in found if isinstance(s, int) and s > 0)


def by_position_data(
    table: pd.DataFrame,
    metric: str = "kl",
    site: str = "logits",
    *,
    stage: str = "surgery",
    plan: SwapPlan | None = None,
    dictionary: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """The numbers of `by_position`: one bin of one student a row, `start` and `end` inclusive."""
    who = q.students(table)
    bins = [p for p in table["position"].unique() if p != "all"]
    quantity = q.quantity(metric, dictionary)
    rows = q.pick(table, quantity, site=site, stage=stage, mode="free", student=who, position=bins)
    rows = rows[["student", "metric", "stat", "site", "position", "value", "lo", "hi", "over", "n"]]
    start = rows["position"].map(position_start)
    end = rows["position"].map(lambda p: int(p.rpartition("-")[2]))
    return rows.assign(start=start, end=end).reset_index(drop=True)


@style.styled
def by_position(
    table: pd.DataFrame,
    metric: str = "kl",
    site: str = "logits",
    *,
    plan: SwapPlan | None = None,
    stage: str = "surgery",
    dictionary: Mapping[str, Any] | None = None,
    ax: Axes | None = None,
    width: float = style.WIDTH,
) -> Figure:
    """Draw a metric by token position, log x, an interval for each bin and student.

    Args:
        table: the long table.
        metric: with rows by position.
        site: where.
        plan: the run's plan.json; marks the borders of segments.
        stage: surgery or repair.
        dictionary: the run's metrics.json; default: the cards of the installed metrics.
        ax: draw there instead of making a figure.
        width: of the figure, in inches.

    Raises:
        UsageError: the table has no rows by position.
    """
    data = by_position_data(table, metric, site, stage=stage, dictionary=dictionary)
    quantity = q.quantity(metric, dictionary)
    figure = style.figure_of(ax) if ax is not None else style.new_figure(width, 2.7)
    axis = ax if ax is not None else figure.subplots()
    if ax is None:
        lengths = " and ".join(str(s) for s in segments(plan))
        marks = f" Dotted: borders of segments of {lengths} tokens." if lengths else ""
        zeros = " Hollow at the foot: exactly 0." if (data["value"] == 0).any() else ""
        style.frame(
            figure,
            f"Output shift by token position: {quantity.label}, free, {stage}",
            f"Bars: range of positions; markers: mean; whiskers: {intervals.named(data['over'])}."
            f"{marks}{zeros} Run {' '.join(table['run_id'].unique())}.",
        )
    _draw(axis, data, segments(plan), _floors(table, quantity, site, stage))
    axis.set_ylabel(quantity.label)
    return figure


def _floors(table: pd.DataFrame, quantity: q.Quantity, site: str, stage: str) -> dict[str, float]:
    """What nothing changed reads, by range of positions."""
    where = {"student": "floor", "site": site, "stage": stage, "position": None}
    if not q.has(table, quantity, **where):
        return {}
    rows = q.pick(table, quantity, **where)
    return dict(zip(rows["position"], rows["value"], strict=True))


def _draw(ax: Axes, data: pd.DataFrame, borders: list[int], floors: Mapping[str, float]) -> None:
    who = list(dict.fromkeys(data["student"]))
    ax.set_xscale("log", base=2)
    ends = []
    for rank, student in enumerate(who):
        rows = data[data["student"] == student]
        colour, marker = style.look(student, who)
        left = np.log2(rows["start"].to_numpy(dtype=float) + 1)  # position 0 has a place, too
        right = np.log2(rows["end"].to_numpy(dtype=float) + 2)
        share = (rank + 1) / (len(who) + 1)
        x = 2 ** (left + (right - left) * share)  # students side by side: whiskers stay readable
        y = rows["value"].to_numpy(dtype=float)
        ax.hlines(y, 2**left, 2**right, color=colour, lw=1.2, alpha=0.45, zorder=2)
        ax.vlines(x, rows["lo"], rows["hi"], color=colour, lw=1.1, zorder=3)
        (points,) = ax.plot(
            x, y, ls="none", marker=marker, ms=4.2, color=colour, mec="white", mew=0.3, zorder=4,
        )  # fmt: skip
        texts = [_text(row, data, floors) for row in rows.itertuples()]
        readout.read_out(points, f"points-{student}", texts)
        ends.append((2 ** right[-1], y[-1], student, colour))
    usual = data[data["value"] > 0].groupby("student")["value"].median()
    if len(usual) and usual.max() > WIDE * usual.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    elif len(usual):
        ax.set_ylim(bottom=min(0.0, float(data[["value", "lo"]].min().min())))
    else:
        ax.set_ylim(-0.05, 1)
        ax.set_yticks([0])
    bins = data.drop_duplicates("position").sort_values("start")
    low, high = float(bins["start"].iloc[0]) + 1, float(bins["end"].iloc[-1]) + 2
    ax.set_xlim(low * 0.97, high * 1.02)
    ax.set_xticks(
        [((a + 1) * (b + 2)) ** 0.5 for a, b in zip(bins["start"], bins["end"], strict=True)],
        [str(p).replace("-", "\u2013") for p in bins["position"]],
    )
    if style.figure_of(ax).get_figwidth() < 5:
        ax.tick_params(axis="x", rotation=45)
    ax.xaxis.minorticks_off()
    ax.tick_params(axis="x", length=0)
    if ax.get_yscale() == "log":
        ax.set_ylim(_positive_range(data))
        for student, rows in data[data["value"] == 0].groupby("student"):
            _mark_zeros(
                ax, rows, str(student), who, [_text(r, data, floors) for r in rows.itertuples()]
            )
        ends = [(x, max(y, ax.get_ylim()[0]), name, colour) for x, y, name, colour in ends]
    ax.set_xlabel("token position in the document window (log scale)")
    ax.grid(axis="y", lw=0.4, color="#e6e6e6")
    ax.set_axisbelow(True)
    for length in borders:
        for border in range(length, int(bins["end"].iloc[-1]) + 1, length):
            ax.axvline(
                border + 1, color=style.FAINT, lw=0.8, ls=":", zorder=1, gid=f"segment-{border}"
            )
    style.label_ends(ax, ends)


def _text(row: Any, data: pd.DataFrame, floors: Mapping[str, float]) -> str:
    """What a point reads out: its value, the floor, and the other students at the same positions."""
    others = data[(data["position"] == row.position) & (data["student"] != row.student)]
    said = {row.metric: style.interval(row.value, row.lo, row.hi)}
    if row.position in floors:
        said["floor"] = style.number(floors[row.position])
    said |= {readout.called(r.student): style.number(r.value) for r in others.itertuples()}
    where = str(row.position).replace("-", "\u2013")
    return readout.lines(f"{row.student}, positions {where}", {**said, "tokens": f"{row.n:,}"})


def _mark_zeros(
    ax: Axes, rows: pd.DataFrame, student: str, who: list[str], texts: list[str]
) -> None:
    """A log axis has no place for 0: a hollow mark at its foot."""
    colour, marker = style.look(student, who)
    share = (who.index(student) + 1) / (len(who) + 1)
    left, right = np.log2(rows["start"] + 1.0), np.log2(rows["end"] + 2.0)
    (zeros,) = ax.plot(
        2 ** (left + (right - left) * share), np.zeros(len(rows)), ls="none", marker=marker, ms=4.2,
        mfc="white", mec=colour, mew=0.9, clip_on=False, zorder=5, transform=ax.get_xaxis_transform(),
    )  # fmt: skip
    readout.read_out(zeros, f"zeros-{student}", texts)


def _positive_range(data: pd.DataFrame) -> tuple[float, float]:
    numbers = data[["value", "lo", "hi"]].to_numpy(dtype=float)
    numbers = numbers[np.isfinite(numbers) & (numbers > 0)]
    return float(numbers.min()) / 1.6, float(numbers.max()) * 1.4
