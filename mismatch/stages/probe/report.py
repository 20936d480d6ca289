"""The report of probes: their answers as a table and the passkey figure; a trace that asked probes shows them, too."""

from __future__ import annotations

from mismatch.report.figures import ReportFigure
from mismatch.report.page import Html, grid, reading
from mismatch.report.sections import Section, findings, replaced
from mismatch.runs.folder import Run
from mismatch.stages.probe.passkey_figure import passkey, passkey_data
from mismatch.stages.probe.words import headlines, named, probes_of

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
    """Answers, what they say, what was replaced, figures."""
    said = [findings(run)] if run.findings else []
    return [*answers(run), *said, replaced(run), Section("", figures(run))]


def answers(run: Run) -> tuple[Section, ...]:
    """The answers to the probes as a table; nothing where none was asked."""
    return (Section("Answers to the probes", (_answers(run),)),) if probes_of(run.table) else ()


def _answers(run: Run) -> Html:
    """Every headline: probe, student, and its difference to the teacher, paired."""
    found = headlines(run.table, run.dictionary)
    rows = [
        (
            named(r),
            r.student,
            r.unit,
            reading(r.teacher),
            reading(r.value, r.lo, r.hi) if r.applies else "not applicable",
            reading(r.difference, r.difference_lo, r.difference_hi) if r.applies else "",
        )
        for r in found.itertuples()
    ]
    heads = ("probe", "student", "unit", "teacher", "student reads", "student − teacher, paired")
    marked = [at for at, student in enumerate(found["student"]) if student == "swap"]
    return grid(
        heads, rows, numbers=(3, 4, 5), marked=marked if found["student"].nunique() > 1 else ()
    )
