"""The headline in one picture: output KL of the swap beside its controls, and the differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from mismatch.report import intervals, readout, style
from mismatch.report import quantity as q

WIDE = 20
"""The axis is logarithmic where the largest KL is more than so many times the smallest."""


def output_data(
    table: pd.DataFrame,
    metric: str = "kl",
    *,
    stage: str = "surgery",
    plan: Mapping[str, Any] | None = None,
    dictionary: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """The output shift of each student, then the paired differences, then the floor.

    Returns:
        Rows student, stat, against, value, lo, hi, over, n; `against` is the control of a difference.

    Raises:
        UsageError: the table has no output shift.
    """
    quantity = q.quantity(metric, dictionary)
    where = {"site": "logits", "mode": "free", "stage": stage}
    who = q.students(table)
    means = q.pick(table, quantity, student=[*who, "floor"], **where)
    prefix = f"{quantity.stat}_minus_"
    pairs = [f"{prefix}{student}" for student in who]
    if q.has(table, quantity, student="swap", **{**where, "stat": pairs}):
        means = pd.concat(
            [means, q.pick(table, quantity, student="swap", **{**where, "stat": pairs})]
        )
    order = {name: i for i, name in enumerate([*who, *pairs, "floor"])}
    against = means["stat"].where(means["stat"].isin(pairs), "").str.removeprefix(prefix)
    rank = means["stat"].where(means["stat"].isin(pairs), means["student"]).map(order)
    means = means.assign(against=against, rank=rank).sort_values("rank")
    return means[["student", "stat", "against", "value", "lo", "hi", "over", "n"]].reset_index(
        drop=True
    )


@style.styled
def output_shift(
    table: pd.DataFrame,
    metric: str = "kl",
    *,
    stage: str = "surgery",
    plan: Mapping[str, Any] | None = None,
    dictionary: Mapping[str, Any] | None = None,
    width: float = style.WIDTH,
) -> Figure:
    """Draw a dot and an interval for each student, and for each swap minus control.

    Args:
        table: the long table.
        metric: at site logits.
        stage: surgery or repair.
        plan: not needed; as the other figures take it.
        dictionary: the run's metrics.json; default: the cards of the installed metrics.
        width: of the figure, in inches.

    Raises:
        UsageError: the table has no output shift.
    """
    data = output_data(table, metric, stage=stage, dictionary=dictionary)
    quantity = q.quantity(metric, dictionary)
    means = data[(data["against"] == "") & (data["student"] != "floor")]
    pairs = data[data["against"] != ""]
    floor = data.loc[data["student"] == "floor", "value"]
    narrow = width < 5 and len(pairs)
    tall = len(means) + len(pairs) + 4 if narrow else max(len(means), len(pairs))
    figure = style.new_figure(width, (1.3 if narrow else 1.0) + 0.24 * tall)
    shape = (1, 1) if pairs.empty else (2, 1) if narrow else (1, 2)
    axes = figure.subplots(*shape, squeeze=False).ravel()
    style.frame(
        figure,
        f"Output shift {quantity.label}, swap beside its controls, free, {stage}",
        f"Dots: mean over tokens; whiskers: {intervals.named(data['over'])}. A difference is of the same "
        f"tokens (paired). {_floor_words(floor)} Run {' '.join(table['run_id'].unique())}.",
    )
    who = list(means["student"])
    _dots(axes[0], means, who, who, readouts(data, quantity))
    if (
        len(means)
        and means["value"].min() > 0
        and means["value"].max() > WIDE * means["value"].min()
    ):
        axes[0].set_xscale("log")
        axes[0].set_xlim(means["value"].min() / 1.6, means["value"].max() * 3)  # room for numbers
        axes[0].xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes[0].xaxis.set_minor_formatter(NullFormatter())
    else:
        _reach(axes[0], float(means[["value", "hi"]].max().max()) * 1.25, 0)
    axes[0].set_title("each student", fontweight="bold")
    if len(pairs):
        names = [f"swap \u2212 {control}" for control in pairs["against"]]
        _dots(axes[1], pairs, names, ["swap"] * len(pairs), readouts(data, quantity))
        axes[1].axvline(0, color=style.FAINT, lw=0.8)
        _reach(axes[1], 1.35 * float(pairs[["value", "lo", "hi"]].abs().max().max()), -1)
        axes[1].set_title(
            "\u2190 better   difference   worse \u2192", fontweight="bold", loc="center"
        )
    for axis in axes:
        axis.set_xlabel(quantity.unit or quantity.label)
    return figure


def readouts(data: pd.DataFrame, quantity: q.Quantity) -> dict[str, str]:
    """What each dot reads out, by student or by `swap − control`; `data` is that of `output_data`."""
    said = {
        f"swap \u2212 {row.against}" if row.against else str(row.student): style.interval(
            row.value, row.lo, row.hi
        )
        for row in data.itertuples()
    }
    floor = {"floor": said.pop("floor", "")}
    means = {name: text for name, text in said.items() if "\u2212" not in name}
    texts = {}
    for row in data[data["student"] != "floor"].itertuples():
        name = f"swap \u2212 {row.against}" if row.against else str(row.student)
        beside = [row.against] if row.against else [s for s in means if s != name]
        others = {readout.called(s): means.get(s, "") for s in beside}
        rest = {**floor, **others, "tokens": f"{row.n:,}"}
        texts[name] = readout.lines(name, {quantity.metric: said[name], **rest})
    return texts


def _dots(
    ax: Axes, rows: pd.DataFrame, names: list[str], who: list[str], texts: Mapping[str, str]
) -> None:
    for height, (student, row) in enumerate(zip(who, rows.itertuples(), strict=True)):
        colour, marker = style.look(student, who)
        if pd.notna(row.lo):
            ax.hlines(height, row.lo, row.hi, color=colour, lw=1.6)
        (dot,) = ax.plot(
            row.value, height, marker=marker, ms=5.5, color=colour, mec="white", mew=0.4, clip_on=False,
        )  # fmt: skip
        readout.read_out(dot, f"dot-{names[height]}", [texts[names[height]]])
        right = row.hi if pd.notna(row.hi) else row.value
        ax.annotate(
            style.number(row.value), (right, height), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=7, color=style.INK,
        )  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", lw=0.4, color="#e6e6e6")
    ax.set_axisbelow(True)


def _reach(ax: Axes, reach: float, left: int) -> None:
    """Limits from `left` times `reach` to `reach`; where all is 0, a single tick says so."""
    ax.set_xlim(left * (reach or 1), reach or 1)
    ax.xaxis.set_major_locator(MaxNLocator(5, symmetric=left < 0) if reach else FixedLocator([0]))


def _floor_words(floor: pd.Series) -> str:
    if floor.empty:
        return "The floor was not measured."
    return f"Floor (nothing changed, another batch shape): {style.number(float(floor.iloc[0]))}."
