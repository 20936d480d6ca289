"""The repair curve: what was left of the damage after each stage, against tokens and against time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mismatch.report import intervals, readout, style
from mismatch.stages.repair.config import SWAPPED
from mismatch.stages.repair.plan import Branch, RepairPlan

COLUMNS = (
    *("stage", "kl", "lo", "hi", "nll", "gap_closed", "gap_lo", "gap_hi"),
    *("retrieval", "retrieval_lo", "retrieval_hi"),
    *("tokens", "steps", "seconds", "kept"),
)
STAGE_COLOURS = {
    SWAPPED: "#777777",
    "inherit": "#8c564b",
    "scores": "#d55e00",
    "slots": "#999933",
    "closed-form": "#0072b2",
    "local": "#009e73",
    "block": "#56b4e9",
    "window": "#e69f00",
    "end-to-end": "#cc79a7",
}
SMALLEST = 1e-4
"""Share of the damage below which a control is not drawn: the unswapped layer reads 0, up to the rounding of a sum."""


def stage_table(plan: RepairPlan) -> pd.DataFrame:
    """A row per stage of the repair ladder, in their order."""
    rows = [{**vars(stage), "stage": stage.name} for stage in plan.stages]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def branch_line(at: Branch, repaired: float) -> str:
    """What a person reads of one branch that was taken out.

    Args:
        at: the branch.
        repaired: the KL with the branch in, nats per token.
    """
    if at.branch is None:
        return f"{at.where}: branches not applicable, the mechanism has none"
    verdict = {
        "used": "",
        "bypassed": f": repaired by bypass, the {at.branch} branch is not used",
        "open": ": whether it is used is open, there is too little text to tell (give more --tokens)",
    }[at.verdict]
    change = f"{at.more:+.4f} [{at.more_lo:+.4f}, {at.more_hi:+.4f}]"
    return (
        f"{at.where} without its {at.branch}: KL {repaired:.4f} -> {at.kl:.4f}, {change}{verdict}"
    )


def repair_data(_table: pd.DataFrame, *, plan: RepairPlan, dictionary: Any = None) -> pd.DataFrame:
    """The numbers of the picture."""
    return stage_table(plan)


@style.styled
def repair_figure(_table: pd.DataFrame, *, plan: RepairPlan, dictionary: Any = None) -> Figure:
    """The picture, from a run."""
    return repair_curve(plan)


@style.styled
def repair_curve(plan: RepairPlan) -> Figure:
    """Held-out KL of every stage, with its interval; controls as lines; retrieval, where the ladder was judged on it.
    Stages that were undone are hollow."""
    frame = stage_table(plan)
    frame = frame[(frame.index == 0) | (frame["tokens"] > 0)]  # others were left out
    figure = style.new_figure(style.WIDTH, 3.0)
    judged = frame["retrieval"].notna().any()
    left, right, *more = figure.subplots(1, 3 if judged else 2)
    right.sharey(left)
    right.tick_params(labelleft=False)
    controls = {
        name: found.kl[0]
        for name, found in plan.students.items()
        if name not in ("swap", "repaired") and found.kl[0] > 0
    }
    low, high = _range(frame, controls)
    for ax, column, label in (
        (left, "tokens", "training tokens, all stages so far"),
        (right, "seconds", "seconds of repair, all stages so far"),
    ):
        ax.set_yscale("log")
        _curve(ax, frame, column, controls)
        for name, kl in controls.items():
            colour = style.look(name, list(controls))[0]
            ax.axhline(kl, color=colour, linewidth=0.8, linestyle="--", zorder=0)
        ax.set_xlabel(label)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _short(v)))
        ax.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_ylim(low, high)
    left.set_ylabel("KL to the teacher, nats per token")
    for ax in more:
        _retrieval(ax, frame)
    marks = [
        Line2D([], [], ls="none", marker="o", ms=5, color=STAGE_COLOURS[r]) for r in frame["stage"]
    ]
    left.set_title(" ")  # room for the names, which are as wide as both panels
    names = left.legend(
        marks,
        list(frame["stage"]),
        frameon=False,
        fontsize=7,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=len(marks),
        handletextpad=0.1,
        columnspacing=1.0,
        borderpad=0.0,
    )
    names.set_in_layout(False)
    style.frame(
        figure,
        "What is left of the damage, on held-out text",
        f"Bars: {intervals.named([plan.over])}. Hollow: a stage that made it worse and was undone. Dashed: controls."
        + (
            " Right: prompts in which something must be retrieved; 0 is the teacher."
            if judged
            else ""
        ),
    )
    edge = right.get_xlim()[1]
    style.label_ends(
        right,
        [(edge, kl, name, style.look(name, list(controls))[0]) for name, kl in controls.items()],
    )
    return figure


def _retrieval(ax: Axes, frame: pd.DataFrame) -> None:
    """What the answers of the judge's prompts lost, stage by stage."""
    for at, row in enumerate(frame.itertuples()):
        colour = STAGE_COLOURS[row.stage]
        if row.retrieval_lo == row.retrieval_lo:
            ax.plot([at, at], [row.retrieval_lo, row.retrieval_hi], color=colour, linewidth=1.1)
        (point,) = ax.plot(
            at, row.retrieval, marker="o", ms=5, color=colour, mfc=colour if row.kept else "white"
        )
        said = style.interval(row.retrieval, row.retrieval_lo, row.retrieval_hi)
        text = readout.lines(row.stage, {"NLL of the answers minus the teacher's": said})
        readout.read_out(point, f"retrieval-{at}", [text])
    ax.axhline(0, color=style.FAINT, linewidth=0.6, zorder=0)
    ax.set_xticks(range(len(frame)), [])
    ax.set_xlabel("stages, in their order")
    ax.set_ylabel("retrieval lost, nats per token of an answer")


def _range(frame: pd.DataFrame, controls: Mapping[str, float]) -> tuple[float, float]:
    """Of the y axis: everything that is drawn; a control that reads exactly 0 has no place on it."""
    drawn = [*frame["kl"], *frame["lo"].dropna(), *frame["hi"].dropna(), *controls.values()]
    shown = [value for value in drawn if value > SMALLEST * float(frame["kl"].max())]
    return 0.8 * min(shown), 1.25 * max(shown)


def _short(value: float) -> str:
    """`500`, `20k`, `1.5M`."""
    if value < 1000:
        return f"{value:g}"
    return f"{value / 1000:g}k" if value < 1e6 else f"{value / 1e6:g}M"


def _text(row: Any, controls: Mapping[str, float]) -> str:
    """What a point reads out: the KL left, the gap closed, what the stage took, and the controls."""
    closed, lo, hi = (100 * x for x in (row.gap_closed, row.gap_lo, row.gap_hi))
    said = {
        "KL left, nats per token": style.interval(row.kl, row.lo, row.hi),
        "gap closed": f"{closed:.1f} % {intervals.band(lo, hi, '{:.1f}'.format)}",
        "tokens": f"{row.tokens:,}",
        "seconds": f"{row.seconds:.0f}",
        **{f"control {name}": style.number(kl) for name, kl in controls.items()},
    }
    return readout.lines(row.stage + ("" if row.kept else ", undone"), said)


def _curve(ax: Axes, frame: pd.DataFrame, column: str, controls: Mapping[str, float]) -> None:
    spent = frame[column].cumsum().clip(lower=0)
    kept = list(frame["kl"].where(frame["kept"]).ffill())
    reached = list(spent)
    for at, stage in enumerate(frame["stage"].iloc[1:], 1):
        # What a stage that was undone left is what it found.
        line = (reached[at - 1 : at + 1], kept[at - 1 : at + 1])
        ax.plot(*line, color=STAGE_COLOURS[stage], linewidth=1.1, zorder=1)
    for at, (x, row) in enumerate(zip(spent, frame.itertuples(), strict=True)):
        colour = STAGE_COLOURS[row.stage]
        point, _, _ = ax.errorbar(
            [x],
            [row.kl],
            yerr=[[row.kl - row.lo], [row.hi - row.kl]] if row.lo == row.lo else None,
            marker="o",
            markersize=5,
            color=colour,
            markerfacecolor=colour if row.kept else "white",
            capsize=2,
            linestyle="none",
        )
        readout.read_out(point, f"point-{column}-{at}", [_text(row, controls)])
