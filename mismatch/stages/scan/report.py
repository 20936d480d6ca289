"""The report of a scan: what hangs on one layer (or head), the atlas, and a table of every one."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mismatch.report import intervals
from mismatch.report.figures import ReportFigure
from mismatch.report.page import Cell, Html, grid, join, reading, tag, whole
from mismatch.report.sections import Section, verdict
from mismatch.runs.folder import Run
from mismatch.stages.scan.atlas import atlas
from mismatch.stages.scan.damage import (
    PANELS,
    Panel,
    against,
    atlas_data,
    place_of,
    students,
    unit_of,
)
from mismatch.stages.scan.plan import ScanPlan
from mismatch.stages.scan.sure import how_sure
from mismatch.stages.scan.words import can_do, carrier, done, scan_verdict, teacher_words

FIGURES = (
    ReportFigure(
        "atlas",
        "Atlas: one layer, or one head, replaced at a time",
        atlas,
        atlas_data,
        "Each row is a layer, each column a mechanism (or one of its heads), each panel a question. Read a column "
        "down: where is it cheap. "
        "Read a row across the panels: a layer that is pale on text and dark on retrieval carries something that "
        "ordinary text does not ask for, and should be kept. A mechanism no paler than `zero` in its row has not "
        "earned its place there.",
    ),
)

NOTHING = "No task was scanned that the teacher can do and that could hang on one layer."


def figures(run: Run) -> tuple[ReportFigure, ...]:
    """The atlas."""
    return FIGURES


def sections(run: Run) -> list[Section]:
    """The verdict, the atlas, every layer, the controls."""
    notes = tuple(tag("p", note, class_="warning") for note in run.plan.notes)
    return [
        verdict(scan_verdict(run.table, run.plan) or NOTHING),
        Section("", (*notes, *FIGURES)),
        Section(f"Every {unit_of(run.plan)}", (every_layer(run.table, run.plan),)),
        Section("How sure the ranks are", (_how_sure(run),)),
        Section("Against the controls", (controls(run.table, run.plan),)),
    ]


def _how_sure(run: Run) -> Html:
    names = [name for name, control in students(run.table, run.plan).items() if not control]
    return how_sure(run.plan, done(run.table, run.plan), names, unit_of(run.plan))


def _panels(data: pd.DataFrame) -> list[Panel]:
    return [panel for panel in PANELS if panel.task in set(data["task"])]


def every_layer(table: pd.DataFrame, plan: ScanPlan) -> Html:
    """A row for each mechanism and layer (or head), with what it costs on each task; larger is worse."""
    data, unit = atlas_data(table), unit_of(plan)
    panels = _panels(data)
    cells = {(r.task, r.student, place_of(r)): r for r in data.itertuples()}
    alone = {
        (panel.task, name): carrier(
            data[
                (data["task"] == panel.task)
                & (data["student"] == name)
                & (data["kind"] != "missing")
            ]
        )
        for panel in panels
        if panel.signed and can_do(table, panel.task, plan)
        for name in students(table, plan)
    }
    rows: list[tuple[Any, ...]] = []
    marked = []
    for name, control in students(table, plan).items():
        for at in sorted({at for _, student, at in cells if student == name}):
            found = [cells.get((panel.task, name, at)) for panel in panels]
            if not control and at in [one for (_, who), one in alone.items() if who == name]:
                marked.append(len(rows))
            where = (at,) if isinstance(at, int) else at
            rows.append((f"{name} (control)" if control else name, *where, *map(_cost, found)))
    words = (
        f"What the output or the answer loses where this {unit} alone is replaced; "
        f"{intervals.named(data['over'])}; larger is worse. In colour: a {unit} on which a task hangs alone."
    )
    told = [
        tag("p", f"{panel.title}{teacher_words(table, panel)}{_unable(table, panel, plan)}.")
        for panel in panels
        if panel.signed
    ]
    places = ("layer",) if unit == "layer" else ("layer", unit)
    heads = ("mechanism", *places, *(f"{p.title.partition(':')[0]}, {p.unit}" for p in panels))
    numbers = range(1, len(heads))
    return join([tag("p", words), *told, grid(heads, rows, numbers=numbers, marked=marked)])


def _unable(table: pd.DataFrame, panel: Panel, plan: ScanPlan) -> str:
    if can_do(table, panel.task, plan):
        return ""
    return ": the teacher itself cannot do this, and nothing follows from these numbers"


def _cost(row: Any) -> Cell | str:
    if row is None or row.kind == "missing":
        return "not applicable"
    return reading(row.value, row.lo, row.hi)


def controls(table: pd.DataFrame, plan: ScanPlan) -> Html:
    """In how many layers each mechanism beats each control, by the paired intervals."""
    rows = [
        (
            row.student,
            panel.title.partition(":")[0],
            row.control,
            *map(whole, (row.better, row.worse, row.open, row.none)),
        )
        for panel in _panels(atlas_data(table))
        for row in against(table, panel).itertuples()
    ]
    if not rows:
        return tag("p", "No control was scanned beside the mechanisms.")
    unit = unit_of(plan)
    words = (
        f"In how many {unit}s a mechanism costs less (better) or more (worse) than the control in the same {unit}, as "
        "far as the interval of the paired difference tells."
    )
    heads = (
        "mechanism",
        "task",
        "control",
        "better in",
        "worse in",
        "not told apart in",
        "no interval in",
    )
    return join([tag("p", words), grid(heads, rows, numbers=(3, 4, 5, 6))])
