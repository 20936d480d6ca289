"""The report of a diagnosis: the verdict, the share of the damage by cause, findings."""

from __future__ import annotations

from mismatch.report.figures import ReportFigure
from mismatch.report.sections import Section, findings, replaced, verdict
from mismatch.runs.folder import Run
from mismatch.stages.diagnose.figure import diagnosis_data, diagnosis_figure

FIGURES = (
    ReportFigure(
        "diagnosis",
        "Which correction returns the damage",
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
    """The verdict, the figure, findings, what was replaced."""
    return [
        verdict(run.plan.get("verdict", "")),
        Section("", FIGURES),
        findings(run),
        replaced(run),
    ]
