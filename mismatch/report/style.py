"""How every figure looks: colours by meaning, type sizes, captions, and how a figure is saved.

Colour: a distance is drawn darker the larger it is (viridis, reversed, so that ink means mismatch and
a swapped layer stands against the white of the layers before it); a signed quantity on PuOr centred
at no change. White is exactly zero, the pale tint is at or below the floor, hatched grey is not
measured there. Students have one colour and one marker each, everywhere (Okabe and Ito 2008, safe for
colour-blind readers).
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from mismatch.errors import UsageError
from mismatch.runs.files import json_text, write_atomic

WIDTH = 7.0
"""Inches: text width of a page. 3.4 is one column of two."""

DISTANCE_MAP = "viridis_r"
SIGNED_MAP = "PuOr_r"  # orange: larger than the teacher; purple: smaller
ZERO = "#ffffff"
FLOOR = "#e4e0ee"
MISSING = "#c4c4c4"
INK = "#222222"
FAINT = "#666666"
OUTLINE = "#d55e00"

_STUDENTS = {
    "swap": ("#d55e00", "o"),
    "zero": ("#0072b2", "s"),
    "mean": ("#009e73", "^"),
    "skip": ("#cc79a7", "v"),
    "random": ("#7a5195", "D"),
    "linear": ("#a6761d", "P"),
    "identity": ("#56b4e9", "X"),
    "floor": ("#777777", "_"),
}
_SPARE = (
    ("#e69f00", "<"),
    ("#0072b2", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "v"),
    ("#332288", ">"),
    ("#56b4e9", "D"),
    ("#882255", "h"),
    ("#44aa99", "p"),
)

_RC: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "text.color": INK,
    "axes.labelcolor": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 200,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "mismatch",  # same figure, same bytes
    "text.parse_math": False,  # a `$` in a name is a dollar
}

P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function with the settings above, and leave the caller's settings alone."""

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(_RC):
            return draw(*args, **kwargs)

    return inside


def look(student: str, students: Sequence[str] = ()) -> tuple[str, str]:
    """Colour and marker of a student. One that is not known gets a spare one by its rank."""
    if student in _STUDENTS:
        return _STUDENTS[student]
    others = sorted(s for s in students if s not in _STUDENTS)
    return _SPARE[others.index(student) % len(_SPARE)] if student in others else _SPARE[0]


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_of(ax: Axes) -> Figure:
    """The whole figure that an axis is in."""
    figure = ax.get_figure(root=True)
    if figure is None:
        raise UsageError("this axis is in no figure", hint="make it with figure.subplots()")
    return figure


def frame(figure: Figure, title: str, caption: str) -> None:
    """Title above and caption below, wrapped to the width; the figure grows by their lines."""
    width, height = figure.get_size_inches()
    title = textwrap.fill(title, int(width * 11.5))
    caption = textwrap.fill(caption, int(width * 17.5))
    more = title.count("\n") * 0.15 + max(caption.count("\n") - 1, 0) * 0.115
    figure.set_size_inches(width, height + more)
    figure.suptitle(title, x=0.008, ha="left", fontsize=9, fontweight="bold")
    figure.supxlabel(caption, x=0.008, ha="left", fontsize=6.5, color=FAINT)


def panel_title(ax: Axes, label: str, summary: str = "") -> None:
    """The name of a panel at its left, and what it asks in small type at its right if it fits."""
    room = int(figure_of(ax).get_figwidth() * 10)
    ax.set_title(textwrap.fill(label, room), pad=5, fontweight="bold")
    if len(label) * 1.3 + len(summary) < figure_of(ax).get_figwidth() * 17:
        ax.set_title(summary, loc="right", pad=5, fontsize=6.5, color=FAINT)


def number(value: float | None) -> str:
    """Three significant digits, without an exponent between 0.0001 and 10 million."""
    if value is None or pd.isna(value):
        return "-"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    digits = f"{value:#.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return digits.rstrip(".")


def interval(value: float, lo: float, hi: float) -> str:
    """`0.0612 [0.0551, 0.0670]`, or the value alone where there is no interval."""
    if pd.isna(lo) or pd.isna(hi):
        return number(value)
    return f"{number(value)} [{number(lo)}, {number(hi)}]"


def plain_log(*axes: Axis) -> None:
    """Plain numbers at the powers of ten of logarithmic axes: math text is off."""
    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_formatter(NullFormatter())


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved apart to at least `gap`, in their order: labels that do not overlap."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = [float(h) for h in heights]
    for _ in range(200):
        still = True
        for low, high in pairwise(order):
            short = gap - (moved[high] - moved[low])
            if short > 1e-6:
                moved[low] -= short / 2
                moved[high] += short / 2
                still = False
        if still:
            break
    return moved


def label_ends(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names right of the axes at the heights where lines end. Each end is (x, y, text, colour), in data units."""
    figure_of(ax).draw_without_rendering()  # the layout must stand before places are measured
    places = [float(ax.transData.transform((x, y))[1]) for x, y, _, _ in ends]
    dot = ax.figure.dpi / 72
    for (_, y, text, colour), place, height in zip(
        ends, places, spread(places, 9 * dot), strict=True
    ):
        ax.annotate(
            text,
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(5, (height - place) / dot),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=7.5,
            annotation_clip=False,
        )


@styled
def to_bytes(figure: Figure, kind: str, *, as_text: bool = False) -> bytes:
    """The figure as svg or png, without a date, so that the same figure gives the same bytes.

    Args:
        figure: what to write.
        kind: svg or png.
        as_text: letters of an svg are text in the reader's font, which can be searched, and not outlines.
    """
    sink = io.BytesIO()
    metadata = {"Date": None, "Creator": "mismatch"} if kind == "svg" else {"Software": "mismatch"}
    with mpl.rc_context({"svg.fonttype": "none" if as_text else "path"}):
        figure.savefig(sink, format=kind, metadata=metadata)
    return sink.getvalue()


def save(
    figure: Figure, folder: Path | str, name: str, data: pd.DataFrame, made: dict[str, Any]
) -> None:
    """Write a figure as name.png, .svg, .csv (the data in it) and .json (how it was made).

    Raises:
        RunError: a file cannot be written.
    """
    contents: dict[str, bytes] = {
        "png": to_bytes(figure, "png"),
        "svg": to_bytes(figure, "svg"),
        "csv": data.to_csv(index=False, lineterminator="\n").encode(),
        "json": json_text({"figure": name, "rows": len(data), **made}).encode(),
    }
    for kind, content in contents.items():
        path = Path(folder) / f"{name}.{kind}"
        write_atomic(path, partial(_put, content))


def _put(content: bytes, file: IO[bytes]) -> None:
    file.write(content)
