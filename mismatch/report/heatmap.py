"""The shift heatmap: layers across, sites down in the order of computation, one panel per metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm, LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mismatch.errors import UsageError
from mismatch.report import quantity as q
from mismatch.report import readout, style
from mismatch.report.heatmap_cells import PANELS, readouts
from mismatch.report.quantity import Quantity

DECADES = (2, 3)
"""The colour scale spans at least and at most so many decades where the floor lies lower: a floor of
1e-7 must not press 0.5 and 0.05 together, nor a narrow range look wide."""


def colour_norm(panels: Sequence[pd.DataFrame], signed: bool) -> Normalize:
    """One scale for all these panels (what `quantity.cells` gave, of one metric).

    A distance: log, up to the largest; its lower end is the floor, or where the floor is further
    down than `DECADES` the smallest value within those. A signed quantity: linear, centred at 0.
    """
    cells = pd.concat(panels, ignore_index=True)
    size = cells["value"].abs()
    size = size[np.isfinite(size) & (size > 0)]
    top = float(size.max()) if len(size) else 1.0
    if signed:
        return CenteredNorm(0.0, top)
    floor = float(cells["floor"].max()) if cells["floor"].notna().any() else 0.0
    least, most = (top / 10**decades for decades in DECADES)
    values = size[cells.loc[size.index, "kind"] == "value"]
    low = max(floor, most, min(least, float(values.min()) if len(values) else least))
    return LogNorm(low if low < top else top / 10, top)


def colours(cells: pd.DataFrame, norm: Normalize, signed: bool) -> np.ndarray:
    """RGBA of each cell. What is not a value has a colour that is not on the scale."""
    scale = mpl.colormaps[style.SIGNED_MAP if signed else style.DISTANCE_MAP]
    value = cells["value"].to_numpy(dtype=float)
    low, high = float(norm.vmin or 0.0), float(norm.vmax or 1.0)
    shown = np.clip(np.where(cells["kind"] == "value", value, high), low, high)
    rgba = scale(np.ma.getdata(norm(shown)))
    for kind, colour in (("zero", style.ZERO), ("floor", style.FLOOR), ("missing", style.MISSING)):
        rgba[(cells["kind"] == kind).to_numpy()] = to_rgba(colour)
    return rgba


@style.styled
def heatmap(
    table: pd.DataFrame,
    metric: str | Sequence[str] | None = None,
    site: str | Sequence[str] | None = None,
    *,
    student: str = "swap",
    mode: str = "free",
    stage: str = "surgery",
    plan: Mapping[str, Any] | None = None,
    dictionary: Mapping[str, Any] | None = None,
    ax: Axes | None = None,
    width: float = style.WIDTH,
) -> Figure:
    """Draw the shift of every layer and site.

    Args:
        table: the long table.
        metric: one, several (a panel each), or None: those of `PANELS` that the table has. `kl` at a
            site of a block is `lens_kl`.
        site: one or several; None: the five of a block. With a single one the rows are the students.
        student: whose shift.
        mode: free or forced.
        stage: surgery or repair.
        plan: not needed; as the other figures take it.
        dictionary: the run's metrics.json; default: the cards of the installed metrics.
        ax: draw one panel there instead of making a figure.
        width: of the figure, in inches.

    Returns:
        The figure; `heatmap_data` gives the numbers in it.

    Raises:
        UsageError: the table lacks the metric, the site or the student, or `ax` with several panels.
    """
    panels = _panels(table, metric, site, student, mode, stage, dictionary)
    if ax is not None:
        if len(panels) != 1:
            raise UsageError(
                f"{len(panels)} metrics do not fit on one axis",
                hint="name one: heatmap(metric=...)",
            )
        quantity, cells = panels[0]
        norm = colour_norm([cells], quantity.signed)
        draw_panel(ax, cells, quantity, norm, texts=readouts(table, cells, quantity, mode, stage))
        ax.set_xlabel("layer")
        return style.figure_of(ax)
    rows = panels[0][1]["row"].nunique()
    figure = style.new_figure(width, 0.95 + len(panels) * (0.46 + 0.165 * rows))
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (quantity, cells) in zip(axes, panels, strict=True):
        norm = colour_norm([cells], quantity.signed)
        draw_panel(axis, cells, quantity, norm, texts=readouts(table, cells, quantity, mode, stage))
    axes[-1].set_xlabel("layer")
    whose = "each student" if panels[0][1].attrs["rows"] == "student" else f"student {student}"
    style.frame(
        figure,
        f"Shift of {whose} against the teacher, {mode}, {stage}",
        caption(table, [c for _, c in panels]),
    )
    return figure


def heatmap_data(
    table: pd.DataFrame,
    metric: str | Sequence[str] | None = None,
    site: str | Sequence[str] | None = None,
    *,
    student: str = "swap",
    mode: str = "free",
    stage: str = "surgery",
    plan: Mapping[str, Any] | None = None,
    dictionary: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """The numbers of `heatmap`, one cell a row, with the kind of each cell."""
    panels = _panels(table, metric, site, student, mode, stage, dictionary)
    return pd.concat([cells for _, cells in panels], ignore_index=True).drop(columns="row")


def _panels(
    table: pd.DataFrame,
    metric: str | Sequence[str] | None,
    site: str | Sequence[str] | None,
    student: str,
    mode: str,
    stage: str,
    dictionary: Mapping[str, Any] | None,
) -> list[tuple[Quantity, pd.DataFrame]]:
    sites = q.BLOCK_SITES if site is None else (site,) if isinstance(site, str) else tuple(site)
    if metric is None:
        where = {"student": student, "mode": mode, "stage": stage, "site": list(sites)}
        names = [m for m in PANELS if q.has(table, q.quantity(m, dictionary), **where)]
        names = names or [PANELS[0]]
    else:
        names = [metric] if isinstance(metric, str) else list(metric)
    names = ["lens_kl" if m == "kl" and "logits" not in sites else m for m in names]
    single = len(sites) == 1
    out = []
    for name in names:
        quantity = q.quantity(name, dictionary)
        who = q.students(table) if single else [student]
        found = [
            q.cells(table, quantity, student=s, mode=mode, sites=sites, stage=stage)
            for s in who
            if s == student or q.has(table, quantity, student=s, mode=mode, site=list(sites))
        ]
        cells = pd.concat(found, ignore_index=True)
        cells["row"] = cells["student"] if single else cells["site"]
        cells.attrs["rows"] = "student" if single else "site"
        out.append((quantity, cells))
    return out


def draw_panel(
    ax: Axes,
    cells: pd.DataFrame,
    quantity: Quantity,
    norm: Normalize,
    title: str | None = None,
    texts: Sequence[str] = (),
) -> None:
    """One panel, with its colour bar.

    Args:
        ax: where.
        cells: one row of the picture per value of `row`.
        quantity: what they are.
        norm: of `colour_norm`.
        title: default: the metric and what it asks.
        texts: what each cell reads out (`readouts`).
    """
    rows = list(dict.fromkeys(cells["row"]))
    layers = cells["layer"].nunique()
    rgba = colours(cells, norm, quantity.signed).reshape(len(rows), layers, 4)
    mesh = ax.pcolormesh(
        np.arange(layers + 1) - 0.5,
        np.arange(len(rows) + 1) - 0.5,
        rgba,
        edgecolors="white",
        linewidth=0.4 if style.figure_of(ax).get_figwidth() / layers > 0.15 else 0.1,
    )
    if texts:
        at = style.figure_of(ax).axes.index(ax)
        readout.read_out(mesh, f"cells-{at}-{quantity.metric}", texts)
    missing = (cells["kind"] == "missing").to_numpy().reshape(len(rows), layers)
    for row, layer in np.argwhere(missing):
        ax.add_patch(
            Rectangle((layer - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", ec="#9a9a9a", lw=0)
        )
    ax.set_xlim(-0.5, layers - 0.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_yticks(range(len(rows)), rows)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(layers, 12), min_n_ticks=2))
    ax.tick_params(length=2)
    for side in ax.spines.values():
        side.set_visible(True)
    for layer in sorted(cells.loc[cells["swapped"], "layer"].unique()):
        ax.add_patch(
            Rectangle(
                (layer - 0.5, -0.5),
                1,
                len(rows),
                fill=False,
                ec=style.OUTLINE,
                lw=1.3,
                clip_on=False,
            )
        )
        ax.plot(layer, -0.5, marker="v", ms=5, color=style.OUTLINE, clip_on=False, zorder=5)
    style.panel_title(ax, title or quantity.label, "" if title else quantity.summary)
    _say_zero(ax, cells, len(rows))
    if (cells["kind"] == "value").any():
        _colour_bar(ax, cells, quantity, norm)


def _say_zero(ax: Axes, cells: pd.DataFrame, rows: int) -> None:
    """Write `exactly 0` on the white before the swap, where there is room for it."""
    still = int(cells.groupby("layer")["kind"].agg(lambda k: (k == "zero").all()).cumprod().sum())
    if still >= 4:
        ax.text(
            (still - 1) / 2, (rows - 1) / 2, "exactly 0", ha="center", va="center", fontsize=7,
            color=style.FAINT, bbox={"fc": "white", "ec": "none", "pad": 2}, zorder=6,
        )  # fmt: skip


def _colour_bar(ax: Axes, cells: pd.DataFrame, quantity: Quantity, norm: Normalize) -> None:
    signed = quantity.signed
    scale = mpl.colormaps[style.SIGNED_MAP if signed else style.DISTANCE_MAP].with_extremes(
        under=style.FLOOR
    )
    floor = float(cells["floor"].max()) if cells["floor"].notna().any() else 0.0
    extend = "neither" if signed or floor == 0 else "min"
    bar = style.figure_of(ax).colorbar(
        ScalarMappable(norm, scale),
        ax=ax,
        extend=extend,
        extendfrac=0.12,
        pad=0.012,
        aspect=9,
        shrink=0.98,
    )
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(length=2, labelsize=6.5)
    if signed:
        bar.ax.yaxis.set_major_locator(MaxNLocator(4, symmetric=True))
    else:
        bar.ax.yaxis.set_major_locator(LogLocator(10, numticks=4))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        bar.ax.yaxis.set_minor_locator(NullLocator())
    if extend == "min":
        bar.ax.annotate(
            f"floor {style.number(floor)}",
            (0.5, 0),
            xycoords="axes fraction",
            xytext=(7, -8),
            textcoords="offset points",
            fontsize=6,
            color=style.FAINT,
            va="center",
        )


def caption(table: pd.DataFrame, panels: Sequence[pd.DataFrame]) -> str:
    """What the colours that are not on the scale mean, of those that occur, and the run."""
    kinds = set(pd.concat(panels)["kind"])
    said = {
        "zero": "White: exactly 0 (a signed panel is pale near 0, too).",
        "floor": "Pale: at or below the floor, not told apart from no change.",
        "missing": "Hatched grey: not measured there.",
    }
    words = [text for kind, text in said.items() if kind in kinds]
    if q.swapped_layers(table):
        words.append("Outline and triangle: swapped layer.")
    floors = pd.concat(panels)["floor"]
    if floors.isna().all():
        words.append("The floor was not measured.")
    elif not floors.any():
        words.append("Floor (the teacher against itself in another batch shape): exactly 0.")
    else:
        words.append("Floor: the largest reading of the teacher against itself, other batch shape.")
    words.append(f"Run {' '.join(table['run_id'].unique())}.")
    return " ".join(words)
