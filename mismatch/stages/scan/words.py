"""A scan in words: for every task and mechanism its worst and best layers, and how often it beats its controls."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mismatch.report import intervals
from mismatch.report.style import interval, number
from mismatch.stages.scan.damage import (
    PANELS,
    Panel,
    Place,
    against,
    atlas_data,
    place_of,
    students,
    told,
    unit_of,
)
from mismatch.stages.scan.plan import HasTasks, ScanPlan
from mismatch.stages.scan.sure import agreement_lines, sure_lines

SHOWN = 3
"""Layers named at either end."""

ALONE, LEAST = 3.0, 0.5
"""A layer carries a task alone when it costs at least so many times the next one, and at least so many nats."""

ABLE = 0.5
"""The teacher can do a task when it loses at most so much of what knowing nothing loses."""


def scan_summary(table: pd.DataFrame, plan: ScanPlan | None = None) -> str:
    """The end of a scan in a terminal; readable without colour.

    Args:
        table: the long table of a scan.
        plan: of the run.
    """
    data, unit = atlas_data(table), unit_of(plan)
    rows = students(table, plan)
    parts = [f"warning: {note}" for note in (() if plan is None else plan.notes)]
    for panel in PANELS:
        here = data[(data["task"] == panel.task) & (data["kind"] != "missing")]
        if here.empty:
            continue
        parts += ["", f"{panel.title}, {panel.unit}{teacher_words(table, panel)}"]
        able = can_do(table, panel.task, plan)
        if not able:
            parts.append("  the teacher itself cannot do this: nothing follows from these numbers")
        for name, control in rows.items():
            cells = here[here["student"] == name]
            shown = _ends(cells)
            parts += _lines(name, shown, len(cells), control, unit)
            if able and plan is not None and not control:
                named = [_short(place_of(c)) for end in shown for c in end.itertuples()]
                parts += sure_lines(plan, panel.task, name, named, unit)
            if able and panel.signed and (at := carrier(cells)) is not None:
                text = _on_text(data, name, at, unit)
                parts.append(f"    -> {told(at, unit)} alone carries it{text}")
            parts += [f"    {text}" for text in _against(table, panel, name, unit)]
    if plan is not None:
        names = [name for name, control in rows.items() if not control]
        parts += ["", *agreement_lines(plan, done(table, plan), names, unit)]
    return "\n".join(parts).strip("\n")


def done(table: pd.DataFrame, plan: ScanPlan) -> list[str]:
    """The tasks that the teacher can do."""
    return [p.task for p in PANELS if p.task in plan.tasks and can_do(table, p.task, plan)]


def scan_verdict(table: pd.DataFrame, plan: ScanPlan | None = None) -> str:
    """What hangs on one layer (or head), and of which mechanism that is true; "" where nothing was asked that could.

    Args:
        table: the long table of a scan.
        plan: of the run.
    """
    data, unit = atlas_data(table), unit_of(plan)
    sentences = []
    for panel in PANELS:
        here = data[(data["task"] == panel.task) & (data["kind"] != "missing")]
        if not panel.signed or here.empty or not can_do(table, panel.task, plan):
            continue
        at: dict[Place, list[str]] = {}
        for name, control in students(table, plan).items():
            cells = here[here["student"] == name]
            if not control and (where := carrier(cells)) is not None:
                worst = float(cells["value"].max())
                at.setdefault(where, []).append(f"{name} {number(worst)}")
        what = panel.title.partition(":")[0]
        said = "; ".join(f"{told(one, unit)} ({', '.join(names)})" for one, names in at.items())
        sentences.append(
            f"{what} hangs on one {unit}, in {panel.unit} lost: {said}."
            if said
            else f"{what} hangs on no single {unit}."
        )
    return " ".join(sentences)


def can_do(table: pd.DataFrame, task: str, plan: HasTasks | None = None) -> bool:
    """Whether the teacher does a task well enough for its loss to mean anything; text always."""
    known = None if plan is None else plan.tasks.get(task)
    chance = None if known is None else known.chance
    reads = teacher_reads(table, task)
    return chance is None or reads is None or abs(reads) <= ABLE * chance


def teacher_reads(table: pd.DataFrame, task: str) -> float | None:
    """What the teacher itself reads of a task; None: it was not asked."""
    panel = next(panel for panel in PANELS if panel.task == task)
    reading = panel.stat.removesuffix("_minus_teacher")
    rows = table[
        (table["student"] == "teacher")
        & (table["metric"] == panel.metric)
        & (table["stat"] == reading)
    ]
    return None if rows.empty else float(rows["value"].iloc[0])


def teacher_words(table: pd.DataFrame, panel: Panel) -> str:
    """What the teacher itself reads: it says how much can be lost."""
    reads = teacher_reads(table, panel.task)
    return "" if reads is None else f"; the teacher reads {number(reads)}"


def _ends(cells: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The worst, and of the rest the best."""
    order = cells.sort_values("value", ascending=False, kind="stable")
    return order.head(SHOWN), order.iloc[SHOWN:].tail(SHOWN).iloc[::-1]


def _lines(
    name: str, ends: tuple[pd.DataFrame, pd.DataFrame], count: int, control: bool, unit: str
) -> list[str]:
    worst, best = ends
    if worst.empty:
        return [f"  {name}: nowhere measured"]
    title = f"  {name}" + (" (control)" if control else "")
    if not pd.concat(ends)["value"].any():
        return [f"{title}: exactly 0 in all {count} {unit}s"]
    lines = [title, f"    worst {unit}s  {_named(worst)}"]
    if len(best):
        lines.append(f"    best {unit}s   {_named(best)}")
    return lines


def _named(cells: pd.DataFrame) -> str:
    return "   ".join(
        f"{_short(place_of(cell))}: {interval(cell.value, cell.lo, cell.hi)}"
        for cell in cells.itertuples()
    )


def _short(at: Place) -> str:
    """`18`, or `18.2` of a head."""
    return str(at) if isinstance(at, int) else f"{at[0]}.{at[1]}"


def carrier(cells: pd.DataFrame) -> Place | None:
    """The layer (or head) that costs a task so much more than every other that they hardly count; None where there is
    none.

    Args:
        cells: of one mechanism on one task, as `atlas_data` gives them.
    """
    order = cells.dropna(subset="value").sort_values("value", ascending=False, kind="stable")
    values = order["value"].to_numpy(dtype=float)
    if len(values) < 3 or values[0] < LEAST or values[0] < ALONE * max(values[1], 0.0):
        return None
    return place_of(next(order.itertuples()))


def _on_text(data: pd.DataFrame, name: str, at: Place, unit: str) -> str:
    """What ordinary text says of the same swap."""
    cells = data[(data["task"] == "text") & (data["student"] == name) & (data["kind"] != "missing")]
    here = [cell.value for cell in cells.itertuples() if place_of(cell) == at]
    if not here:
        return ""
    value = float(here[0])
    rank = 1 + int((cells["value"] > value).sum())
    return f"; on text it costs {number(value)} nats, number {rank} of {len(cells)} {unit}s"


def _against(table: pd.DataFrame, panel: Panel, name: str, unit: str) -> list[str]:
    """In how many layers (or heads) it is better or worse than a control."""
    rows = against(table, panel)
    return [
        f"against {row.control}: {_told(row, unit)}"
        for row in rows[rows["student"] == name].itertuples()
    ]


def _told(row: Any, unit: str) -> str:
    if not (row.better or row.worse or row.open):
        return intervals.WHY_NONE
    words = f"better in {row.better} {unit}s, worse in {row.worse}, not told apart in {row.open}"
    return words + (f", {intervals.NONE} in {row.none}" if row.none else "")
