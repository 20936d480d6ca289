"""The report of a diagnosis: the verdict, the share of the damage by cause, findings, every correction."""

from __future__ import annotations

from mismatch.report import intervals, style
from mismatch.report.figures import ReportFigure
from mismatch.report.page import Cell, Html, grid, join, reading, tag
from mismatch.report.sections import Section, findings, replaced, verdict
from mismatch.runs.folder import Run
from mismatch.stages.diagnose.figure import (
    PANELS,
    diagnosis_data,
    diagnosis_figure,
    percent,
)
from mismatch.stages.diagnose.numbers import Found
from mismatch.stages.diagnose.plan import DiagnosisPlan

FIGURES = (
    ReportFigure(
        "diagnosis",
        "Which correction recovers the damage",
        diagnosis_figure,
        diagnosis_data,
        "Top: the three causes and the rest add up to 100. Below, one thing corrected at a time, from simple to rich: "
        "at 100 the damage is gone, at 0 that was not the matter. A richer correction often includes the simpler ones "
        "above it, so the first long bar is the one to read. Hollow bars took values from the teacher: they name a "
        "cause, and no repair has them.",
    ),
)


def figures(run: Run) -> tuple[ReportFigure, ...]:
    """One: the shares."""
    return FIGURES


def sections(run: Run) -> list[Section]:
    """The verdict, the damage, the figure, findings, every correction, what was replaced."""
    plan: DiagnosisPlan = run.plan
    found = plan.diagnosis
    return [
        verdict(plan.verdict),
        Section("", (damage(found), *FIGURES)),
        findings(run),
        *([Section("Every correction", (corrections(plan),))] if found.corrections else []),
        replaced(run),
    ]


def damage(found: Found) -> Html:
    """The output KL of the swap and of the controls in the same slots."""
    rows = [
        (name, reading(kl.value, kl.lo, kl.hi))
        for name, kl in {"swap": found.damage, **found.controls}.items()
    ]
    return grid(
        ("student", f"output KL, nats per token, {intervals.named([found.over])}"),
        rows,
        numbers=(1,),
        marked=(0,),
    )


def corrections(plan: DiagnosisPlan) -> Html:
    """A row for each correction: its cause, the share of the KL that it recovers, the KL left."""
    data = diagnosis_data(plan=plan)
    data = data[data["panel"] != "cause"]
    rows = [
        (
            row.says,
            PANELS[row.panel],
            Cell(percent(row.share), row.share),
            "no effect" if row.does_nothing else intervals.band(row.lo, row.hi, percent),
            Cell(style.number(row.kl), row.kl),
        )
        for row in data.itertuples()
    ]  # fmt: skip
    words = (
        "One thing corrected at a time, fitted on the calibration text and measured on the evaluation text. In colour: "
        "the leading one."
    )
    skipped = [
        tag("p", f"Not applicable: {text}", class_="faint")
        for text in plan.diagnosis.not_applicable
    ]
    heads = (
        "correction",
        "cause",
        "recovered, %",
        intervals.named([plan.diagnosis.over]),
        "KL left, nats per token",
    )
    marked = [at for at, leading in enumerate(data["leading"]) if leading]
    return join([tag("p", words), grid(heads, rows, numbers=(2, 3, 4), marked=marked), *skipped])
