"""A diagnosis in a picture: the share of the damage that each correction recovers, by cause."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mismatch.errors import UsageError
from mismatch.report import intervals, readout, style
from mismatch.stages.diagnose.numbers import Kl, Share
from mismatch.stages.diagnose.plan import DiagnosisPlan

CAUSES = {
    "distribution": "distribution mismatch",
    "position": "lost position",
    "premise": "broken residual premise",
}
"""The three causes, in words."""
COLOURS = {
    "distribution": "#0072b2",
    "position": "#e69f00",
    "premise": "#009e73",
    "unexplained": "#999999",
    "part": "#7a5195",
}
PANELS = {
    "cause": "share of each cause",
    **CAUSES,
    "part": "one head, branch or token",
}
ORACLES = ("rope", "size", "first", "massive")
"""Corrections that take values from the teacher while they run: no repair has them."""
LEFT = -0.6  # where a bar to the left is cut
COLUMNS = ("panel", "colour", "name", "says", "share", "lo", "hi", "kl", "leading", "does_nothing")


def diagnosis_data(
    _table: Any = None, *, plan: DiagnosisPlan, dictionary: Any = None
) -> pd.DataFrame:
    """A row for each cause and each correction.

    Raises:
        UsageError: nothing was taken apart, because nothing was damaged.
    """
    found = plan.diagnosis
    if not found.corrections or found.unexplained is None:
        raise UsageError("there is nothing to explain: the output does not move")
    rest = {"unexplained": found.unexplained}
    rows = [
        _row("cause", name, name, CAUSES.get(name, name), share, float("nan"))
        for name, share in {**found.causes, **rest}.items()
    ]
    for one in found.corrections:
        row = _row(one.group, one.group, one.name, one.says, one.share, one.kl.value)
        row |= {
            "leading": one.name == found.leading,
            "does_nothing": one.does_nothing,
        }
        rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _row(panel: str, colour: str, name: str, says: str, share: Share, kl: float) -> dict[str, Any]:
    return {
        "panel": panel,
        "colour": colour,
        "name": name,
        "says": says,
        "share": share.value,
        "lo": share.lo,
        "hi": share.hi,
        "kl": kl,
        "leading": False,
        "does_nothing": False,
    }


@style.styled
def diagnosis_figure(
    table: pd.DataFrame,
    *,
    plan: DiagnosisPlan,
    dictionary: Any = None,
    width: float = style.WIDTH,
) -> Figure:
    """Draw a bar and an interval for each cause, and for each correction under its cause.

    Raises:
        UsageError: nothing was damaged.
    """
    data = diagnosis_data(plan=plan)
    panels = [name for name in PANELS if name in set(data["panel"])]
    counts = [int((data["panel"] == name).sum()) for name in panels]
    figure = style.new_figure(width, 1.0 + 0.19 * sum(counts) + 0.3 * len(panels))
    axes = figure.subplots(
        len(panels), 1, sharex=True, squeeze=False, height_ratios=[n + 0.4 for n in counts]
    )[:, 0]
    kls = {"swap": plan.diagnosis.damage, **plan.diagnosis.controls}
    beside = {f"KL of {name}": style.interval(*_ends(kl)) for name, kl in kls.items()}
    left = max(LEFT, min(-0.05, float(data[["share", "lo"]].min().min()) - 0.05))
    for ax, name in zip(axes, panels, strict=True):
        _bars(ax, data[data["panel"] == name], left, beside)
        ax.set_title(PANELS[name], fontweight="bold", pad=3)
    axes[-1].set_xlabel("share of the output KL that is recovered, %")
    found = plan.diagnosis
    skipped = found.not_applicable
    style.frame(
        figure,
        f"{found.swap}: how much of its damage, {style.number(found.damage.value)} nats per token, each "
        "correction recovers",
        "Each bar: one thing corrected in what the swapped module adds, fitted on other text. Whiskers: "
        f"{intervals.named([found.over])}. Bold: the leading one. Corrections overlap, so rows do not add up; the "
        "shares of the causes and the unexplained rest do. Left of 0: worse than before. Hollow: takes "
        "values from the teacher."
        + (f" Not applicable: {'; '.join(skipped)}." if skipped else "")
        + f" Run {' '.join(table['run_id'].unique())}.",
    )
    return figure


def _text(row: Any, beside: Mapping[str, str]) -> str:
    """What a bar reads out: the share recovered, the KL left, and the KL of the swap and its controls."""
    band = "" if pd.isna(row.lo) else f" [{percent(row.lo)}, {percent(row.hi)}]"
    said = {
        "recovered": f"{percent(row.share)} %{band}" + (", no effect" if row.does_nothing else ""),
        "KL left, nats per token": "" if pd.isna(row.kl) else style.number(row.kl),
    }
    return readout.lines(row.says, {**said, **beside})


def _bars(ax: Axes, data: pd.DataFrame, left: float, beside: Mapping[str, str]) -> None:
    for at, row in enumerate(data.itertuples()):
        colour = COLOURS[row.colour]
        shown = max(row.share, left)
        fill = "white" if row.name in ORACLES or row.panel == "part" else colour
        bars = ax.barh(at, shown, height=0.66, facecolor=fill, edgecolor=colour, linewidth=1.0)
        readout.read_out(bars.patches[0], f"bar-{row.panel}-{at}", [_text(row, beside)])
        if pd.notna(row.lo) and row.hi > left:
            ax.plot(
                [max(row.lo, left), row.hi],
                [at, at],
                color=style.INK,
                lw=0.9,
                solid_capstyle="butt",
            )
        text = "no effect" if row.does_nothing else percent(row.share)
        ax.annotate(
            f"< {100 * left:.0f}: {text}" if row.share < left else text,
            (max(row.hi if pd.notna(row.hi) else row.share, row.share, 0.0), at),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=style.FAINT if row.does_nothing else style.INK,
            fontweight="bold" if row.leading else "normal",
        )
    ax.set_yticks(range(len(data)), list(data["says"]))
    for label, row in zip(ax.get_yticklabels(), data.itertuples(), strict=True):
        label.set_fontweight("bold" if row.leading else "normal")
    ax.set_ylim(len(data) - 0.5, -0.5)
    ax.set_xlim(left, 1.12)
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    ax.axvline(0, color=style.INK, lw=0.6)
    ax.axvline(1, color=style.FAINT, lw=0.5, ls=":")
    ax.grid(axis="x", lw=0.3, color="#dddddd")
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)


def _ends(number: Kl) -> tuple[float, float, float]:
    return number.value, number.lo, number.hi


def percent(share: float) -> str:
    """A share in whole percent, without a negative zero."""
    return f"{round(100 * share) + 0.0:.0f}"
