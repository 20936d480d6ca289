"""The report of probes: their answers as a table and the passkey figure; a trace that asked probes shows them, too."""

from __future__ import annotations

from mismatch.report import style
from mismatch.report.figures import ReportFigure
from mismatch.report.page import Html, grid
from mismatch.report.sections import Section, replaced
from mismatch.runs.folder import Run
from mismatch.stages.probe.words import (
    ROWS,
    headlines,
    named,
    passkey,
    passkey_data,
    probes_of,
)

FIGURES = (
    ReportFigure(
        "passkey",
        "Passkey retrieval",
        passkey,
        passkey_data,
        "Yellow is found, dark is lost. A column that is dark from some length on is a context that ends there; dark "
        "rows are a depth that was forgotten. For a mechanism with segments look at how many segments lie between key "
        "and question, not at the depth. The number tells how near a miss was: about -15 is not knowing the key.",
    ),
)


def figures(run: Run) -> tuple[ReportFigure, ...]:
    """Those of the probes that were asked."""
    asked = probes_of(run.table)
    return tuple(one for one in FIGURES if one.name in asked)


def sections(run: Run) -> list[Section]:
    """Answers, what was replaced, figures."""
    return [*answers(run), replaced(run), Section("", figures(run))]


def answers(run: Run) -> tuple[Section, ...]:
    """The answers to the probes as a table; nothing where none was asked."""
    return (Section("Answers to the probes", (_answers(run),)),) if probes_of(run.table) else ()


def _answers(run: Run) -> Html:
    """The headlines; a probe of many layers or heads shows the first ones."""
    found = headlines(run.table, run.dictionary)
    found = found.groupby(["metric", "student"], sort=False).head(ROWS)
    rows = [
        (
            named(r),
            r.student,
            style.number(r.teacher),
            style.number(r.value) if r.applies else "not applicable",
            style.interval(r.difference, r.difference_lo, r.difference_hi) if r.applies else "",
        )
        for r in found.itertuples()
    ]
    heads = ("probe", "student", "teacher", "reading", "minus the teacher, 95 % interval")
    return grid(heads, rows, numbers=(2, 3, 4))
