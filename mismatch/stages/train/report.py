"""The report of a training: the drift from the teacher over the tokens, layer by layer, and beside the controls."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mismatch.report import intervals, readout, style
from mismatch.report.figures import ReportFigure
from mismatch.report.page import grid, reading, tag, whole
from mismatch.report.sections import Section, replaced, verdict
from mismatch.runs.folder import Run
from mismatch.stages.train.plan import TrainPlan

BEFORE, AFTER = style.FAINT, style.look("swap")[0]


def look_table(plan: TrainPlan) -> pd.DataFrame:
    """A row per look: step, tokens, kl, nll; `layer 7` for the shift of a layer; probes by their names."""
    rows = []
    for look in plan.looks:
        row = asdict(look)
        shifts, probes = row.pop("shift"), row.pop("probes")
        rows.append(row | {f"layer {at}": shift for at, shift in enumerate(shifts)} | probes)
    return pd.DataFrame(rows)


def curve_data(_table: pd.DataFrame, *, plan: TrainPlan, dictionary: Any = None) -> pd.DataFrame:
    """The numbers of the picture."""
    return look_table(plan)


@style.styled
def curve(_table: pd.DataFrame, *, plan: TrainPlan, dictionary: Any = None) -> Figure:
    """Left the KL against tokens, controls as lines; right the shift of each layer before and after."""
    figure = style.new_figure(style.WIDTH, 3.0)
    left, right = figure.subplots(1, 2)
    tokens = [look.tokens for look in plan.looks]
    left.plot(tokens, [look.kl for look in plan.looks], color=AFTER, lw=1.1, zorder=1)
    for at, look in enumerate(plan.looks):
        (point,) = left.plot(look.tokens, look.kl, marker="o", ms=3.5, color=AFTER)
        said = {"KL, nats per token": style.number(look.kl), "tokens": f"{look.tokens:,}"}
        said |= {name: style.number(value) for name, value in look.probes.items()}
        readout.read_out(point, f"look-{at}", [readout.lines(f"step {look.step:,}", said)])
    controls = {n: s.kl[0] for n, s in plan.students.items() if n not in ("swap", "trained")}
    for name, kl in controls.items():
        colour = style.look(name, list(controls))[0]
        left.axhline(kl, color=colour, lw=0.8, ls="--", zorder=0)
        left.annotate(name, (0.99, kl), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                      color=colour, fontsize=6.5)  # fmt: skip
    left.set_ylim(bottom=0)
    left.set_xlabel("training tokens")
    left.set_ylabel("KL to the teacher, nats")
    left.xaxis.set_major_locator(MaxNLocator(5))
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    for look, colour, name in ((plan.looks[0], BEFORE, "before"), (plan.kept, AFTER, "after")):
        right.plot(
            range(len(look.shift)), look.shift, color=colour, lw=1.1, marker="o", ms=3, label=name
        )
    for layer in plan.layers:
        right.axvline(layer, color=style.OUTLINE, lw=0.6, ls=":", zorder=0)
    right.legend(frameon=False, fontsize=7)
    right.set_ylim(bottom=0)
    right.set_xlabel("layer")
    right.set_ylabel("shift of the stream, relative L2")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    style.frame(
        figure,
        "Drift from the teacher in the training, on evaluation text",
        "Left: each point is a look; dashed: controls, untrained. Right: the stream before and after the training; "
        "dotted: swapped layers. 0 is the teacher.",
    )
    return figure


FIGURES = (
    ReportFigure(
        "training",
        "The drift from the teacher",
        curve,
        curve_data,
        "Lower is nearer to the teacher. A curve that has not levelled off wants more tokens. A layer that is further "
        "off after the training than before was moved to make up for another; without teacher KL in the loss the whole "
        "model may leave its teacher while it learns the training text.",
    ),
)


def figures(run: Run) -> tuple[ReportFigure, ...]:
    """The curve."""
    return FIGURES


def sections(run: Run) -> list[Section]:
    """The verdict, the curve, the students beside each other, the looks."""
    plan: TrainPlan = run.plan
    swap, trained = plan.students["swap"], plan.students["trained"]
    text = (
        f"KL to the teacher {style.number(swap.kl[0])} → {intervals.said(*trained.kl)} nats per token after "
        f"{plan.kept.tokens:,} tokens."
    )
    rows = [
        (
            name,
            reading(*s.kl),
            reading(*s.nll),
            reading(*s.trained_minus) if name != "trained" else "",
        )
        for name, s in plan.students.items()
    ]
    heads = ("student", "KL", "NLL minus the teacher's", "KL, trained − student, paired")
    at = [i for i, name in enumerate(plan.students) if name == "trained"]
    names = list(dict.fromkeys(name for look in plan.looks for name in look.probes))
    looks = [
        (
            whole(look.step),
            whole(look.tokens),
            reading(look.kl),
            reading(look.nll),
            *(reading(look.probes.get(name)) for name in names),
        )
        for look in plan.looks
    ]
    numbers = tuple(range(4 + len(names)))
    return [
        verdict(text),
        Section("", FIGURES),
        Section("Beside the controls", (grid(heads, rows, numbers=(1, 2, 3), marked=at),)),
        Section(
            "Looks",
            (
                grid(
                    ("step", "tokens", "KL", "NLL minus the teacher's", *names),
                    looks,
                    numbers=numbers,
                ),
            ),
        ),
        Section("Notes", (tag("ul", *(tag("li", note) for note in plan.notes)),)),
        replaced(run),
    ]
