"""The depth profile: how the shift grows or heals behind the swap, the swap against its controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mismatch.report import intervals, readout, style
from mismatch.report import quantity as q
from mismatch.report.quantity import Quantity

METRICS = ("rel_l2", "lens_kl")
ROOM = 30
"""The floor is drawn where it lies at most so many times below the smallest value; else it is written."""


@style.styled
def depth_profile(
    table: pd.DataFrame,
    metric: str | Sequence[str] | None = None,
    site: str = "resid_post",
    *,
    mode: str = "free",
    stage: str = "surgery",
    plan: Mapping[str, Any] | None = None,
    dictionary: Mapping[str, Any] | None = None,
    ax: Axes | None = None,
    width: float = style.WIDTH,
) -> Figure:
    """Draw the shift at one site by layer: a line with its interval for each student, log scale.

    Args:
        table: the long table.
        metric: one, or several (a panel each); None: those of `METRICS` that the table has.
        site: of a block.
        mode: free or forced.
        stage: surgery or repair.
        plan: not needed; as the other figures take it.
        dictionary: the run's metrics.json; default: the cards of the installed metrics.
        ax: draw one panel there instead of making a figure.
        width: of the figure, in inches.

    Raises:
        UsageError: the table lacks the metric or the site.
    """
    names = _names(table, metric, site, mode, stage, dictionary)
    if ax is not None:
        _draw(ax, table, q.quantity(names[0], dictionary), site, mode, stage)
        ax.set_xlabel("layer")
        return style.figure_of(ax)
    figure = style.new_figure(width, 0.8 + 1.95 * len(names))
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    over = depth_profile_data(table, names, site, mode=mode, stage=stage, dictionary=dictionary)[
        "over"
    ]
    style.frame(
        figure,
        f"Shift at {site} by layer, {mode}, {stage}",
        f"Lines: the headline statistic; bands: {intervals.named(over)}. On the log scale a straight "
        "falling line heals by the same share at every layer. Triangle: swapped layer. "
        f"Run {' '.join(table['run_id'].unique())}.",
    )
    for axis, name in zip(axes, names, strict=True):
        _draw(axis, table, q.quantity(name, dictionary), site, mode, stage)
    axes[-1].set_xlabel("layer")
    return figure


def depth_profile_data(
    table: pd.DataFrame,
    metric: str | Sequence[str] | None = None,
    site: str = "resid_post",
    *,
    mode: str = "free",
    stage: str = "surgery",
    plan: Mapping[str, Any] | None = None,
    dictionary: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """The numbers of `depth_profile`: student, metric, stat, site, layer, value, lo, hi, over, n."""
    return pd.concat(
        [
            _lines(table, q.quantity(name, dictionary), site, mode, stage)
            for name in _names(table, metric, site, mode, stage, dictionary)
        ],
        ignore_index=True,
    )


def _names(
    table: pd.DataFrame,
    metric: str | Sequence[str] | None,
    site: str,
    mode: str,
    stage: str,
    dictionary: Mapping[str, Any] | None,
) -> list[str]:
    if metric is None:
        where = {"site": site, "mode": mode, "stage": stage}
        found = [m for m in METRICS if q.has(table, q.quantity(m, dictionary), **where)]
        return found or [METRICS[0]]
    return [metric] if isinstance(metric, str) else list(metric)


def _lines(
    table: pd.DataFrame, quantity: Quantity, site: str, mode: str, stage: str
) -> pd.DataFrame:
    who = [*q.students(table), "floor"]
    rows = q.pick(table, quantity, site=site, mode=mode, stage=stage, student=who)
    rows = rows[rows["layer"].notna() & rows["head"].isna()]
    return rows[
        ["student", "metric", "stat", "site", "layer", "value", "lo", "hi", "over", "n", "swapped"]
    ]


def _draw(
    ax: Axes, table: pd.DataFrame, quantity: Quantity, site: str, mode: str, stage: str
) -> None:
    lines = _lines(table, quantity, site, mode, stage)
    who = q.students(table)
    floor = q.floor_of(table, quantity, [site])
    ends = []
    shown = []
    for student in who:
        line = lines[(lines["student"] == student) & (lines["value"] != 0)].dropna(subset="value")
        if line.empty:
            continue
        colour, marker = style.look(student, who)
        x = line["layer"].to_numpy(dtype=float)
        y = line["value"].to_numpy(dtype=float)
        top = student == "swap"
        (drawn,) = ax.plot(
            x, y, color=colour, marker=marker, ms=3.4 if top else 2.8, lw=1.6 if top else 1.0,
            zorder=4 if top else 3, mec="white", mew=0.3,
        )  # fmt: skip
        texts = [_text(row, lines, floor) for row in line.itertuples()]
        readout.read_out(drawn, f"line-{student}-{quantity.metric}", texts)
        ax.fill_between(x, line["lo"], line["hi"], color=colour, alpha=0.18, lw=0)
        ends.append((x[-1], y[-1], student, colour))
        shown.append(y)
    layers = q.layer_count(table)
    ax.set_xlim(-0.5, layers - 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=2))
    style.panel_title(ax, quantity.label, quantity.summary)
    ax.grid(axis="y", lw=0.4, color="#e6e6e6")
    ax.set_axisbelow(True)
    if shown:
        if quantity.signed:
            ax.axhline(0, lw=0.6, color=style.FAINT)
        else:
            bands = lines.loc[lines["student"] != "floor", ["lo", "hi"]].to_numpy().ravel()
            _log_scale(ax, np.concatenate([*shown, bands[np.isfinite(bands)]]))
            _draw_floor(ax, floor, np.concatenate(shown), layers)
        style.label_ends(ax, ends)
    else:
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    swapped = q.swapped_layers(table)
    for layer in swapped:
        ax.plot(
            layer, 0, marker="^", ms=6, color=style.OUTLINE, clip_on=False, zorder=5,
            transform=ax.get_xaxis_transform(),
        )  # fmt: skip
    room = swapped[0] / layers * style.figure_of(ax).get_figwidth() if swapped else 0.0
    if not shown or room > 1:  # inch
        middle = (swapped[0] - 0.5) / 2 if shown else (layers - 1) / 2
        where = "before the swap" if shown else "at every layer"
        ax.text(
            middle, 0.5, f"exactly 0\n{where}", ha="center", va="center", fontsize=7,
            color=style.FAINT, transform=ax.get_xaxis_transform(),
        )  # fmt: skip


def _text(row: Any, lines: pd.DataFrame, floor: float | None) -> str:
    """What a point reads out: its value, the floor, and the other students at the same layer."""
    others = lines[(lines["layer"] == row.layer) & ~lines["student"].isin([row.student, "floor"])]
    said = {row.metric: style.interval(row.value, row.lo, row.hi)}
    if floor is not None:
        said["floor"] = style.number(floor)
    said |= {readout.called(r.student): style.number(r.value) for r in others.itertuples()}
    swapped = ", swapped" if row.swapped else ""
    return readout.lines(f"{row.student}, layer {row.layer}{swapped}, {row.site}", said)


def _log_scale(ax: Axes, values: np.ndarray) -> None:
    ax.set_yscale("log")
    values = values[values > 0]
    if values.size:
        low, high = float(values.min()) / 1.4, float(values.max()) * 1.4
        if high / low < 10:  # so that a flat line does not look like a mountain
            middle = (low * high) ** 0.5
            low, high = middle / 10**0.5, middle * 10**0.5
        ax.set_ylim(low, high)
    plain = FuncFormatter(lambda v, _: f"{v:g}")
    ax.yaxis.set_major_formatter(plain)
    few = values.size > 0 and np.log10(ax.get_ylim()[1] / ax.get_ylim()[0]) < 1.6
    ax.yaxis.set_minor_formatter(
        FuncFormatter(lambda v, _: f"{v:g}" if few and f"{v:e}"[0] in "25" else "")
    )


def _draw_floor(ax: Axes, floor: float | None, values: np.ndarray, layers: int) -> None:
    if floor is None:
        return
    low = float(values[values > 0].min())
    if floor * ROOM >= low:
        ax.set_ylim(bottom=min(floor / 1.5, ax.get_ylim()[0]))
        ax.axhline(floor, color=style.look("floor")[0], lw=1, ls=(0, (4, 2)), gid="floor")
        ax.annotate(
            f"floor {style.number(floor)}", (layers - 0.5, floor), xytext=(-2, 3),
            textcoords="offset points", ha="right", fontsize=6.5, color=style.FAINT,
        )  # fmt: skip
    else:
        words = f"floor {style.number(floor)}, far below \u2193" if floor else "floor exactly 0"
        ax.annotate(
            words, (0, 0), xycoords="axes fraction", xytext=(4, 4), textcoords="offset points",
            fontsize=6.5, color=style.FAINT,
        )  # fmt: skip
