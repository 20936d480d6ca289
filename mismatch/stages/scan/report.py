"""The report of a scan: what hangs on one layer, the atlas, and the layers in words."""

from __future__ import annotations

from mismatch.report.figures import ReportFigure
from mismatch.report.page import tag
from mismatch.report.sections import Section, verdict
from mismatch.runs.folder import Run
from mismatch.stages.scan.atlas import atlas, atlas_data
from mismatch.stages.scan.words import scan_summary, scan_verdict

FIGURES = (
    ReportFigure(
        "atlas",
        "Atlas: one layer replaced at a time",
        atlas,
        atlas_data,
        "Each row is a layer, each column a mechanism, each panel a question. Read a column down: where is it cheap. "
        "Read a row across the panels: a layer that is pale on text and dark on retrieval carries something that "
        "ordinary text does not ask for, and should be kept. A mechanism no paler than `zero` in its row has not "
        "earned its place there.",
    ),
)


def figures(run: Run) -> tuple[ReportFigure, ...]:
    """The atlas."""
    return FIGURES


def sections(run: Run) -> list[Section]:
    """The verdict, the atlas, worst and best layers."""
    return [
        verdict(scan_verdict(run.table, run.plan)),
        Section("", FIGURES),
        Section("Worst and best layers", (tag("pre", scan_summary(run.table, run.plan)),)),
    ]
