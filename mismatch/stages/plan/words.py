"""A plan in words: what its layers were predicted to cost one at a time, and what they cost together."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mismatch.report import intervals, style
from mismatch.stages.plan.figure import plan_data
from mismatch.stages.plan.plan import ChoicePlan
from mismatch.stages.plan.scores import SCORES
from mismatch.stages.scan.damage import PANELS, Panel
from mismatch.stages.scan.reliability import Reliability
from mismatch.stages.scan.unit_sums import DRAWS
from mismatch.stages.scan.words import can_do, teacher_words

IN_A_LINE = 6
"""Ranks."""

Band = tuple[float, float, float]
"""Value and the ends of its 95 % interval."""


@dataclass(frozen=True)
class Outcome:
    """One task: the layers of the plan alone, added up; all of them together; the difference; the controls."""

    panel: Panel
    added: Band
    together: Band
    rest: Band
    controls: Mapping[str, Band]

    @property
    def verdict(self) -> str:
        """Whether the costs add up, as far as the interval of the rest tells."""
        side = intervals.side(*self.rest[1:])
        if side == "none":
            return f"{intervals.NONE}: whether costs add up is not known"
        if side == "open":
            return "costs add up, as far as this shows"
        apart, both = self.added[0], self.together[0]
        times = f" ({style.number(both / apart)} times)" if apart > 0 and both > 0 else ""
        return ("more" if side == "above" else "less") + f" than the sum of its parts{times}"


def outcomes(table: pd.DataFrame) -> list[Outcome]:
    """Every task of a plan.

    Raises:
        UsageError: the table is not that of a plan.
    """
    data = plan_data(table)
    found = []
    for panel in PANELS:
        here = data[data["task"] == panel.task]
        if here.empty:
            continue
        whole = {
            row.kind: _band(row) for row in here.itertuples() if row.kind in ("sum", "together")
        }
        stat = "lost_minus_sum" if panel.signed else "mean_minus_sum"
        rest = table[(table["metric"] == panel.metric) & (table["stat"] == stat)].iloc[0]
        controls = {row.name: _band(row) for row in here[here["kind"] == "control"].itertuples()}
        found.append(Outcome(panel, whole["sum"], whole["together"], _band(rest), controls))
    return found


def _band(row: Any) -> Band:
    return (float(row.value), float(row.lo), float(row.hi))


def headline(plan: ChoicePlan) -> str:
    """`layers[0,3]:infini   (2 of 4 layers, greedy)`."""
    score = "" if plan.score == "kl" else f" by {plan.score}"
    return f"{plan.swap}   ({plan.chosen} of {plan.n_layers} layers, {plan.method}{score})"


def next_command(plan: ChoicePlan, model: str, run: str | None = None) -> str:
    """What to run with the choice; `run` is the folder of the plan, where it was written."""
    chosen = "" if run is None else f" --selected-by {shlex.quote(run)}"
    return f'mismatch trace --model {model} --swap "{plan.swap}"{chosen}'


def plan_summary(
    table: pd.DataFrame, plan: ChoicePlan, model: str = "MODEL", run: str | None = None
) -> str:
    """The end of `mismatch plan` in a terminal; readable without colour.

    Args:
        table: the long table of a plan.
        plan: of the run.
        model, run: for the next command.
    """
    parts = [f"warning: {note}" for note in plan.notes]
    parts += [headline(plan), *_steps(plan), *sure_lines(plan)]
    for one in outcomes(table):
        parts += ["", f"{one.panel.title}, {one.panel.unit}{teacher_words(table, one.panel)}"]
        if not can_do(table, one.panel.task, plan):
            parts.append("  the teacher itself cannot do this: nothing follows from these numbers")
        parts += [
            f"  {'predicted, one at a time added up':<34}{style.interval(*one.added)}",
            f"  {'measured, together':<34}{style.interval(*one.together)}",
            f"  {'measured - predicted':<34}{style.interval(*one.rest)}   {one.verdict}",
        ]
        parts += [
            f"  {name + ' in the same layers':<34}{style.interval(*band)}"
            for name, band in one.controls.items()
        ]
    parts += ["", f"next: {next_command(plan, model, run)}"]
    return "\n".join(parts)


def _steps(plan: ChoicePlan) -> list[str]:
    lines = []
    for at, step in enumerate(plan.steps, 1):
        lines.append(
            f"  step {at}: layer {step.layer} {step.mechanism}; all so far "
            f"{style.interval(step.kl, step.lo, step.hi)}"
            + ("" if step.again is None else f"; the same one in {step.again:.0%} of {DRAWS} draws")
        )
    predicted = plan.predicted_by_scan
    if predicted is not None:
        lines.append(f"  the scan that chose them predicted {style.number(predicted.kl)} in sum")
    return lines


def sure_lines(plan: ChoicePlan) -> list[str]:
    """What other documents and prompts would have chosen, the rank of each layer, and what other scores choose."""
    lines = []
    sure = plan.reliability
    if sure is not None:
        count = len({layer for layers in plan.choice.values() for layer in layers})
        lines += [
            f"  {sure.over} drawn again {sure.draws} times: the same set in {sure.same:.0%}, "
            f"{style.number(sure.kept)} of {count} layers kept on average",
            "  in 95 % or more of the draws: "
            + (", ".join(map(str, sorted(sure.sure))) or "no layer"),
            *rank_lines(sure),
        ]
    elif plan.scores and not SCORES[plan.score].halves:
        why = f"{intervals.WHY_NONE}; and layers that do not all cost the same"
        lines.append(f"  how sure the choice is, is not known: {why}")
    lines += [f"  beside {name}: {found.text()}" for name, found in plan.overlaps.items()]
    if plan.score == "kl" and "answer_nll" in plan.overlaps:
        lines.append(
            "  text alone chose: --score answer_nll, with --scan from the same scan, keeps what answers need"
        )
    return lines


def rank_lines(sure: Reliability) -> list[str]:
    """`layer: rank [its 95 % interval]`, the cheapest first, some in a line."""
    said = [f"{one.place}: {one.rank} [{one.lo}, {one.hi}]" for one in sure.ranks]
    width = max(map(len, said))
    rows = [said[at : at + IN_A_LINE] for at in range(0, len(said), IN_A_LINE)]
    return [
        ("  ranks   " if not at else "          ")
        + "   ".join(s.ljust(width) for s in row).rstrip()
        for at, row in enumerate(rows)
    ]
