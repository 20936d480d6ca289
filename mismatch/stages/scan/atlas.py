"""The atlas of a scan: layers down, mechanisms across, one panel a task, side by side on the same layer axis."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, SymLogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mismatch.report import readout, style
from mismatch.stages.scan.damage import (
    PANELS,
    Panel,
    atlas_data,
    paired,
    place,
    students,
    unit_of,
)
from mismatch.stages.scan.plan import ScanPlan

NAMED, LEAST = 4, 0.001
"""So many of a panel's largest numbers are written into their cells, if they are not below the second."""

DECADES = 5
"""Of the scale of KL: a deleted first layer costs 4 nats, a window that hardly matters 0.0001."""

LINEAR = 1 / 30
"""Of the largest number of a signed panel: what is nearer to 0 is drawn on a linear scale."""

UNCLEAR = "#eeeeee"
"""Colour of a change whose interval holds 0."""

WORDS = 24
"""Letters of a line of a mechanism's name that fit below a panel."""

TALL, LOW, HIGH, TIGHT = 4.2, 0.055, 0.16, 0.1
"""Inches: of all cells of a column together, of a cell at least and at most; below the last no cell is written in."""

MARGIN, ROOM = 0.6, 0.24
"""Inches: left of the panels; width that a cell needs for a number."""


@style.styled
def atlas(
    table: pd.DataFrame,
    *,
    plan: ScanPlan | None = None,
    dictionary: Mapping[str, Any] | None = None,
    width: float = style.WIDTH,
) -> Figure:
    """Draw the atlas.

    Args:
        table: the long table of a scan.
        plan: of the run: the model, order of the mechanisms, and which are controls.
        dictionary: not needed; as the other figures take it.
        width: of the figure, in inches.

    Raises:
        UsageError: the table is not that of a scan.
    """
    data, unit = atlas_data(table, dictionary=dictionary), unit_of(plan)
    columns = students(table, plan)
    by_head = place(data) == ["layer", "head"]
    if by_head:
        table, data = _by_head(table, unit), _by_head(data, unit)
        heads = range(int(data["head"].max()) + 1)
        columns = {_of_head(n, h, unit): control for n, control in columns.items() for h in heads}
    panels = [panel for panel in PANELS if panel.task in set(data["task"])]
    layers = int(data["layer"].max()) + 1
    high = min(max(TALL / layers, LOW), HIGH)
    wide = (width - MARGIN) / len(panels)
    cell = (wide / len(columns), high)
    names = [_short(name, two_lines=cell[0] >= ROOM) for name in columns]
    if by_head:  # the first column of a mechanism has its name, the others their number
        between = "\n" if cell[0] >= ROOM else ", "
        names = [
            f"{_short(name.removesuffix(_head_of(name)), cell[0] >= ROOM)}{between}{unit} 0"
            if at % len(heads) == 0
            else name.rpartition(" ")[2]
            for at, name in enumerate(columns)
        ]
    letters = max(len(line) for name in names for line in name.split("\n"))
    # What stands around the cells: title, panel titles, names, scale and caption.
    figure = style.new_figure(width, 1.75 + max(layers * high, 1.0) + 0.062 * letters)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    named: set[int] = set()
    for axis, panel in zip(axes, panels, strict=True):
        mine = data[data["task"] == panel.task]
        named |= _panel(axis, mine, panel, columns, cell, _readouts(table, mine, panel, columns))
        axis.set_xticks(range(len(columns)), names, rotation=90, ma="right", linespacing=0.95)
        title = textwrap.wrap(panel.title, max(int(wide * 15), 12))
        axis.set_title("\n".join(title), pad=5, fontweight="bold", va="bottom")
    _layer_axis(axes[0], layers, high, named, unit)
    model = None if plan is None else plan.model
    style.frame(
        figure,
        f"One {unit} replaced at a time: what it costs" + (f" ({model})" if model else ""),
        _caption(table, data, panels, columns),
    )
    return figure


def _panel(
    ax: Axes,
    data: pd.DataFrame,
    panel: Panel,
    columns: Mapping[str, bool],
    size: tuple[float, float],
    texts: Mapping[tuple[str, int], str],
) -> set[int]:
    """One task: cells, scale, numbers. Gives the layers whose numbers are written in."""
    layers = int(data["layer"].max()) + 1
    norm = _norm(data, panel.signed)
    order = {name: at for at, name in enumerate(columns)}
    cells = data[data["student"].isin(order)].assign(column=data["student"].map(order))
    cells = cells.sort_values(["layer", "column"])
    rgba = _colours(cells, norm, panel.signed).reshape(layers, len(order), 4)
    mesh = ax.pcolormesh(
        np.arange(len(order) + 1) - 0.5,
        np.arange(layers + 1) - 0.5,
        rgba,
        edgecolors="white",
        linewidth=0.4 if min(size) > 0.1 else 0.1,
    )
    said = [texts[row.student, int(row.layer)] for row in cells.itertuples()]
    readout.read_out(mesh, f"cells-{panel.task}", said)
    for cell in cells[cells["kind"] == "missing"].itertuples():
        ax.add_patch(
            Rectangle(
                (cell.column - 0.5, cell.layer - 0.5),
                1,
                1,
                fill=False,
                hatch="////",
                ec="#9a9a9a",
                lw=0,
            )
        )
    ax.set_xlim(-0.5, len(order) - 0.5)
    ax.set_ylim(layers - 0.5, -0.5)
    ax.tick_params(length=2)
    for side in ax.spines.values():
        side.set_visible(True)
    first = sum(not control for control in columns.values())
    if 0 < first < len(columns):
        ax.axvline(first - 0.5, color=style.INK, lw=1.0)
    _colour_bar(ax, norm, panel)
    return _write_worst(ax, cells[~cells["student"].map(columns).astype(bool)], rgba, size)


def _readouts(
    table: pd.DataFrame, data: pd.DataFrame, panel: Panel, columns: Mapping[str, bool]
) -> dict[tuple[str, int], str]:
    """What each cell reads out: its damage, and the controls in the same layer with the paired differences."""
    known = {
        (row.student, int(row.layer)): style.interval(row.value, row.lo, row.hi)
        for row in data[data["kind"] != "missing"].itertuples()
    }
    apart: dict[tuple[str, int], dict[str, str]] = {}
    for row in paired(table, panel).itertuples():
        apart.setdefault((row.student, int(row.layer)), {})[f"minus {row.control}, paired"] = (
            style.interval(row.value, row.lo, row.hi)
        )
    texts = {}
    for row in data.itertuples():
        at = (row.student, int(row.layer))
        controls = {
            f"control {name}": known.get((name, int(row.layer)), "")
            for name, control in columns.items()
            if control and name != row.student and _head_of(name) == _head_of(row.student)
        }
        said = {panel.unit: known.get(at, ""), **controls, **apart.get(at, {})}
        texts[at] = readout.lines(f"{row.student}, layer {row.layer}", said) if at in known else ""
    return texts


def _by_head(rows: pd.DataFrame, unit: str) -> pd.DataFrame:
    """The rows of a scan by heads, each head of a mechanism as a mechanism of its own."""
    of = [
        name if pd.isna(head) else _of_head(name, int(head), unit)
        for name, head in zip(rows["student"], rows["head"], strict=True)
    ]
    return rows.assign(student=of)


def _of_head(name: str, head: int, unit: str) -> str:
    return f"{name}, {unit} {head}"


def _head_of(name: str) -> str:
    """`, kv head 2` at the end of a column's name; "" of a scan by layers."""
    found = re.search(r", (kv )?head \d+$", name)
    return found.group() if found else ""


def _layer_axis(ax: Axes, layers: int, high: float, named: set[int], unit: str) -> None:
    """Every layer where there is room; those with a number written in are bold."""
    if high >= TIGHT:
        ax.set_yticks(range(layers))
        ax.tick_params(axis="y", labelsize=6)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=15, min_n_ticks=2))
    for at, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True):
        if round(at) in named:
            label.set_fontweight("bold")
    ax.set_ylabel("layer that is replaced, alone" if unit == "layer" else "layer")


def _short(name: str, two_lines: bool) -> str:
    """A mechanism's name, its arguments in a second line, each cut where it is too long."""
    stem, bracket, arguments = name.partition("(")
    lines = [stem, arguments.removesuffix(")")] if bracket and two_lines else [name]
    return "\n".join(line if len(line) <= WORDS else line[: WORDS - 1] + "…" for line in lines)


def _norm(cells: pd.DataFrame, signed: bool) -> Normalize:
    """A distance: log, from the smallest to the largest within `DECADES`. Signed: logarithmic on both sides of 0."""
    size = cells.loc[cells["kind"] == "value", "value"].abs()
    top = float(size.max()) if len(size) else 1.0
    if signed:
        return SymLogNorm(linthresh=top * LINEAR, vmin=-top, vmax=top, linscale=0.6)
    low = max(float(size.min()) if len(size) else 0.0, top / 10**DECADES)
    return LogNorm(min(low, top / 10), top)


def _colours(cells: pd.DataFrame, norm: Normalize, signed: bool) -> np.ndarray:
    scale = mpl.colormaps[style.SIGNED_MAP if signed else style.DISTANCE_MAP]
    value = cells["value"].fillna(0.0).to_numpy(dtype=float)
    shown = np.clip(value, norm.vmin, norm.vmax)
    rgba = scale(np.ma.getdata(norm(shown)))
    known = (("zero", style.ZERO), ("unclear", UNCLEAR), ("missing", style.MISSING))
    for kind, colour in known:
        rgba[(cells["kind"] == kind).to_numpy()] = to_rgba(colour)
    return rgba


def _write_worst(
    ax: Axes, cells: pd.DataFrame, rgba: np.ndarray, size: tuple[float, float]
) -> set[int]:
    """The largest numbers of a panel, framed; written in where a cell has room for them."""
    cells = cells[(cells["kind"] == "value") & (cells["value"] > LEAST)]
    worst = cells.nlargest(NAMED, "value")
    for cell in worst.itertuples():
        corner = (cell.column - 0.5, cell.layer - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, ec=style.INK, lw=0.9, zorder=3))
        colour = rgba[cell.layer, cell.column, :3]
        # As the eye weighs red, green and blue.
        light = float(colour @ (0.299, 0.587, 0.114)) > 0.55
        if size[0] >= ROOM and size[1] >= TIGHT:
            ax.text(
                cell.column, cell.layer, _four(cell.value), ha="center", va="center_baseline",
                fontsize=6, color=style.INK if light else "white",
            )  # fmt: skip
    return set(worst["layer"].astype(int))


def _four(value: float) -> str:
    """A positive number in at most four letters, for a narrow cell: .003, .12, 1.2, 12."""
    digits = 3 if value < 0.1 else 2 if value < 1 else 1 if value < 9.95 else 0
    return f"{value:.{digits}f}".removeprefix("0")


def _colour_bar(ax: Axes, norm: Normalize, panel: Panel) -> None:
    scale = mpl.colormaps[style.SIGNED_MAP if panel.signed else style.DISTANCE_MAP]
    bar = style.figure_of(ax).colorbar(
        ScalarMappable(norm, scale), ax=ax, location="bottom", pad=0.02, aspect=22, shrink=0.98,
        extend="neither" if panel.signed else "min", extendfrac=0.06,
    )  # fmt: skip
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(length=2, labelsize=6.5)
    bar.set_label(panel.unit, fontsize=6.5, labelpad=2)
    if isinstance(norm, SymLogNorm):
        top = float(norm.vmax or 1.0)
        bar.ax.xaxis.set_major_locator(FixedLocator(_decades(top, top * LINEAR)))
    elif isinstance(norm, LogNorm):
        bar.ax.xaxis.set_major_locator(LogLocator(10, numticks=4))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    bar.ax.xaxis.set_minor_locator(NullLocator())


def _decades(top: float, least: float) -> list[float]:
    """0, the powers of ten outside of the linear part, and the end where it is far from them; on both sides."""
    last = math.floor(math.log10(top))
    marks = [10.0**k for k in range(last - 1, last + 1) if 10.0**k > least]
    if top > 3 * 10.0**last:
        marks.append(math.floor(top / 10.0**last) * 10.0**last)
    return [*(-mark for mark in reversed(marks)), 0.0, *marks]


def _caption(
    table: pd.DataFrame, data: pd.DataFrame, panels: Sequence[Panel], rows: Mapping[str, bool]
) -> str:
    kinds = set(data["kind"])
    words = []
    if any(panel.signed for panel in panels):
        words.append("Orange: the right token lost probability; purple: it gained.")
    if any(rows.values()):
        words.append("Right of the line: controls in the same slots.")
    if "zero" in kinds:
        words.append("White: exactly 0.")
    if "unclear" in kinds:
        words.append("Pale grey: the 95 % interval holds 0.")
    if "missing" in kinds:
        words.append("Hatched grey: not applicable, or not measured.")
    words.append(f"Framed: the {NAMED} largest numbers of a panel, controls apart.")
    words.append(f"Run {' '.join(table['run_id'].unique())}.")
    return " ".join(words)
