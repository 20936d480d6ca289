"""The headline in one picture: output KL of the swap beside its controls, and the differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mismatch.report import quantity as q
from mismatch.report import style

WIDE = 20
"""The axis is logarithmic where the largest KL is more than so many times the smallest."""


def output_data(table: pd.DataFrame, metric: str = "kl", *, stage: str = "surgery") -> pd.DataFrame:
    """The output shift of each student, then the paired differences, then the floor.

    Returns:
        Rows student, stat, against, value, lo, hi, n; `against` is the control of a difference.

    Raises:
        UsageError: the table has no output shift.
    """
    where = {"site": "logits", "mode": "free", "stage": stage}
    means = q.pick(table, metric, stat="mean", student=q.students(table), **where)
    floor = (
        q.pick(table, metric, stat="mean", student="floor", **where)
        if q.has(table, metric, student="floor", **where)
        else means.iloc[:0]
    )
    rows = q.pick(table, metric, stat="mean", student="swap", **where)
    at = (table["metric"] == metric) & (table["site"] == "logits") & (table["stage"] == stage)
    pairs = table[at & table["stat"].str.startswith("mean_minus_") & (table["position"] == "all")]
    pairs = pairs[pairs["step"].isin(rows["step"]) & (pairs["mode"] == "free")]
    out = pd.concat([means, pairs, floor])[["student", "stat", "value", "lo", "hi", "n"]]
    against = out["stat"].where(out["stat"].str.startswith("mean_minus_"), "")
    out.insert(2, "against", against.str.removeprefix("mean_minus_"))
    return out.reset_index(drop=True)


@style.styled
def output_shift(
    table: pd.DataFrame,
    metric: str = "kl",
    *,
    stage: str = "surgery",
    dictionary: Mapping[str, Any] | None = None,
    width: float = style.WIDTH,
) -> Figure:
    """Draw a dot and an interval for each student, and for each swap minus control.

    Args:
        table: the long table.
        metric: at site logits.
        stage: surgery or repair.
        dictionary: the run's metrics.json; default: the cards of the installed metrics.
        width: of the figure, in inches.

    Raises:
        UsageError: the table has no output shift.
    """
    data = output_data(table, metric, stage=stage)
    quantity = q.quantity(metric, dictionary)
    means = data[(data["against"] == "") & (data["student"] != "floor")]
    pairs = data[data["against"] != ""]
    floor = data.loc[data["student"] == "floor", "value"]
    height = 0.95 + 0.24 * max(len(means), len(pairs))
    narrow = width < 5 and len(pairs)
    figure = style.new_figure(width, height + (0.5 + 0.24 * len(pairs) if narrow else 0))
    shape = (1, 1) if pairs.empty else (2, 1) if narrow else (1, 2)
    axes = figure.subplots(*shape, squeeze=False).ravel()
    style.frame(
        figure,
        f"Output shift {quantity.label}, swap beside its controls, free, {stage}",
        "Dots: mean over tokens; whiskers: 95 % interval over documents. A difference is of the same "
        f"tokens (paired). {_floor_words(floor)} Run {' '.join(table['run_id'].unique())}.",
    )
    who = list(means["student"])
    _dots(axes[0], means, who, who)
    if len(means) and means["value"].min() > 0 and means["value"].max() > WIDE * means["value"].min():
        axes[0].set_xscale("log")
        axes[0].xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    else:
        axes[0].set_xlim(0, max(float(means[["value", "hi"]].max().max()) * 1.25, 1e-9))
        axes[0].xaxis.set_major_locator(MaxNLocator(5))
    axes[0].set_title("each student", fontweight="bold")
    if len(pairs):
        names = [f"swap \u2212 {control}" for control in pairs["against"]]
        _dots(axes[1], pairs, names, ["swap"] * len(pairs))
        axes[1].axvline(0, color=style.FAINT, lw=0.8)
        reach = float(pairs[["value", "lo", "hi"]].abs().max().max()) or 1e-9
        axes[1].set_xlim(-1.35 * reach, 1.35 * reach)
        axes[1].xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
        axes[1].set_title("\u2190 better   difference   worse \u2192", fontweight="bold", loc="center")
    for axis in axes:
        axis.set_xlabel(quantity.unit or quantity.label)
    return figure


def _dots(ax: Axes, rows: pd.DataFrame, names: list[str], who: list[str]) -> None:
    for height, (student, row) in enumerate(zip(who, rows.itertuples(), strict=True)):
        colour, marker = style.look(student, who)
        if pd.notna(row.lo):
            ax.hlines(height, row.lo, row.hi, color=colour, lw=1.6)
        ax.plot(
            row.value, height, marker=marker, ms=5.5, color=colour, mec="white", mew=0.4,
            gid=f"dot-{names[height]}",
        )  # fmt: skip
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


def _floor_words(floor: pd.Series) -> str:
    if floor.empty:
        return "The floor was not measured."
    return f"Floor (nothing changed, another batch shape): {style.number(float(floor.iloc[0]))}."
