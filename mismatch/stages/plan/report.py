"""The report of a plan: what was chosen, what it costs together, and what it was chosen by."""

from __future__ import annotations

import pandas as pd

from mismatch.report import style
from mismatch.report.figures import ReportFigure
from mismatch.report.page import Html, grid, join, reading, tag
from mismatch.report.sections import Section, verdict
from mismatch.runs.folder import Run
from mismatch.stages.plan.figure import plan_data, plan_figure
from mismatch.stages.plan.plan import ChoicePlan
from mismatch.stages.plan.scores import SCORES
from mismatch.stages.plan.words import Outcome, next_command, outcomes
from mismatch.stages.scan.unit_sums import DRAWS
from mismatch.stages.scan.words import can_do, teacher_words

WITHOUT_DRAWS = (
    "No documents or prompts were drawn again: there are too few, or all layers cost the same, or the choice did not "
    "look at any, or it was made step by step, and each step says how often it is taken again."
)
FIGURES = (
    ReportFigure(
        "plan",
        "The choice: alone, added up, together",
        plan_figure,
        plan_data,
        "Grey: each chosen layer replaced alone. Blue: these added up, which is what the choice was made by. Orange: "
        "all of them replaced together. Green: the control in the same layers. Orange to the right of blue is damage "
        "that no scan of single layers shows; orange to the right of green is no better than deleting.",
    ),
)


def figures(run: Run) -> tuple[ReportFigure, ...]:
    """One: the choice."""
    return FIGURES


def sections(run: Run) -> list[Section]:
    """The verdict, what the choice costs, the figure, what it was chosen by, the next command."""
    notes = tuple(tag("p", note, class_="warning") for note in run.plan.notes)
    model = str(run.manifest.get("model", "MODEL"))
    folder = None if run.path is None else f"runs/{run.path.name}"
    return [
        verdict(_verdict(run.table, run.plan)),
        Section("", (*notes, costs(run.table, run.plan), *FIGURES)),
        Section("What the layers were chosen by", (chosen_by(run.plan),)),
        Section("How sure the choice is", (how_sure(run.plan),)),
        Section("Next", (tag("pre", next_command(run.plan, model, folder)),)),
    ]


def _verdict(table: pd.DataFrame, plan: ChoicePlan) -> str:
    first = outcomes(table)[0]
    text = (
        f"{plan.swap}: {plan.chosen} of {plan.n_layers} layers together cost "
        f"{style.interval(*first.together)} {first.panel.unit}"
    )
    beside = [
        f"{name} there costs {style.number(band[0])}" for name, band in first.controls.items()
    ]
    return "; ".join([text, first.verdict, *beside]) + "."


def costs(table: pd.DataFrame, plan: ChoicePlan) -> Html:
    """A row for each task: predicted, measured, the difference, the controls; larger is worse. Then what follows."""
    found = outcomes(table)
    controls = list(dict.fromkeys(name for one in found for name in one.controls))
    rows = [
        (
            f"{_task(one)}, {one.panel.unit}",
            *(reading(*one.added), reading(*one.together), reading(*one.rest)),
            *(reading(*one.controls[c]) if c in one.controls else "-" for c in controls),
        )
        for one in found
    ]
    words = (
        "Predicted: each layer alone, added up. Measured: all of them together. Larger is worse."
    )
    heads = (
        "task",
        "predicted",
        "measured",
        "measured − predicted",
        *(f"{c} there" for c in controls),
    )
    follows = [tag("p", _follows(table, plan, one)) for one in found if one.verdict]
    return join([tag("p", words), grid(heads, rows, numbers=range(1, len(heads))), *follows])


def _task(one: Outcome) -> str:
    return one.panel.title.partition(":")[0]


def _follows(table: pd.DataFrame, plan: ChoicePlan, one: Outcome) -> str:
    if can_do(table, one.panel.task, plan):
        return f"{_task(one)}: {one.verdict}."
    return (
        f"{_task(one)}: nothing follows, for the teacher itself cannot do this"
        f"{teacher_words(table, one.panel)}."
    )


def chosen_by(plan: ChoicePlan) -> Html:
    """The steps of a greedy choice, or the scores that the best choice was computed from."""
    kind = SCORES[plan.score]
    over = f" ({', '.join(plan.answers)})" if plan.answers else ""
    method = (
        f"Score: {plan.score}, {kind.what}{over}; {kind.source}. Method: {plan.method}. Cost on the selection text, "
        "which is not the text of the numbers above."
    )
    if plan.steps:
        steps = [
            (
                *(at, step.layer, step.mechanism, reading(step.kl, step.lo, step.hi)),
                "-" if step.again is None else f"{step.again:.0%}",
            )
            for at, step in enumerate(plan.steps, 1)
        ]
        titles = (
            *("step", "layer", "mechanism", "KL of all so far, nats per token"),
            f"taken again, of {DRAWS} draws",
        )
        return join([tag("p", method), grid(titles, steps, numbers=(0, 1, 3, 4))])
    rows, marked = [], []
    for at, score in enumerate(plan.scores):
        mine = score.layer in plan.choice.get(score.mechanism, ())
        marked += [at] if mine else []
        rows.append(
            (
                *(score.layer, score.mechanism, reading(score.price), reading(score.kl)),
                reading(score.lost),
                "chosen" if mine else "",
            )
        )
    if not rows:
        return tag("p", method)
    heads = (
        *("layer", "mechanism", f"{plan.score}, {kind.unit}", "KL alone, nats per token"),
        *("retrieval lost alone, nats per key", "choice"),
    )
    return join([tag("p", method), grid(heads, rows, numbers=(0, 2, 3, 4), marked=marked)])


def how_sure(plan: ChoicePlan) -> Html:
    """What other documents and prompts would have chosen, the rank of each layer, and what other scores choose."""
    sure, parts = plan.reliability, []
    if sure is None:
        parts.append(tag("p", WITHOUT_DRAWS))
    else:
        words = (
            f"{sure.over.capitalize()} drawn again {sure.draws} times: {sure.same:.0%} of the draws choose the same "
            f"set, and {style.number(sure.kept)} of {plan.chosen} layers are kept on average."
        )
        rows = [
            (one.place, one.rank, f"{one.lo} to {one.hi}", f"{one.chosen:.0%}")
            for one in sure.ranks
        ]
        chosen = {layer for layers in plan.choice.values() for layer in layers}
        marked = [at for at, one in enumerate(sure.ranks) if one.place in chosen]
        heads = ("layer", "rank, 1 is the cheapest", "95 % of draws", "chosen in")
        parts += [tag("p", words), grid(heads, rows, numbers=(0, 1, 2, 3), marked=marked)]
    if plan.overlaps:
        rows_ = [
            (name, f"{one.shared} of {min(one.sizes)}", f"{one.chance:.1f}", f"{one.p:.3f}")
            for name, one in plan.overlaps.items()
        ]
        heads_ = ("beside the choice by", "layers shared", "by chance", "p of as many by chance")
        parts.append(grid(heads_, rows_, numbers=(1, 2, 3)))
    return join(parts)
