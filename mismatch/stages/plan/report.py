"""The report of a plan: the chosen layers alone, added up, together, and the control in their place."""

from __future__ import annotations

from mismatch.report.figures import ReportFigure
from mismatch.report.page import tag
from mismatch.report.sections import Section
from mismatch.runs.folder import Run
from mismatch.stages.plan.figure import plan_data, plan_figure, plan_summary

FIGURES = (
    ReportFigure(
        "plan",
        "The choice: alone, added up, together",
        plan_figure,
        plan_data,
        "Grey: each chosen layer replaced alone. Blue: these added up, which is what the choice was made by. Orange: "
        "all of them replaced together. Green: the control in the same places. Orange to the right of blue is damage "
        "that no scan of single layers shows; orange to the right of green is no better than deleting.",
    ),
)


def figures(run: Run) -> tuple[ReportFigure, ...]:
    """One: the choice."""
    return FIGURES


def sections(run: Run) -> list[Section]:
    """What was chosen and what it costs, then the figure."""
    model = str(run.manifest.get("model", "MODEL"))
    return [Section("", (tag("pre", plan_summary(run.table, run.plan, model)), *FIGURES))]
