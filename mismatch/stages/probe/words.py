"""What probes answered, in words: the headline of each, beside the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from mismatch import registry
from mismatch.report import intervals, style
from mismatch.report import quantity as q
from mismatch.report.words import columns, plan_lines, subject
from mismatch.runs.plan import SwapPlan
from mismatch.runs.table import conditions

ROWS = 16
"""Headline rows of one probe in a terminal; the others are in the table."""


def headlines(table: pd.DataFrame, dictionary: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """The headline of every probe in a table: teacher, each student, and its paired difference to the teacher.

    Returns:
        Rows metric, stat, unit, layer, head, site, student, teacher, value, lo, hi, difference, difference_lo,
        difference_hi, n, applies; one for each student, layer, head and condition of the headline. `applies` is False
        where the probe cannot be asked of this model.
    """
    out = []
    for metric in probes_of(table):
        quantity = q.quantity(metric, dictionary)
        rows = {_address(row): row for row in table[table["metric"] == metric].itertuples()}
        mine = [row for row in rows.values() if conditions(row.stat)[0] == quantity.stat]
        for row in sorted(mine, key=_order):
            if row.student == "teacher":
                continue
            stat = row.stat.replace(quantity.stat, f"{quantity.stat}_minus_teacher", 1)
            teacher = rows.get(_address(row, student="teacher"))
            shift = rows.get(_address(row, stat=stat))
            out.append(
                {
                    "metric": metric,
                    "stat": row.stat,
                    "unit": quantity.unit,
                    "layer": row.layer,
                    "head": row.head,
                    "site": row.site,
                    "student": row.student,
                    "teacher": np.nan if teacher is None else teacher.value,
                    "value": row.value,
                    "lo": row.lo,
                    "hi": row.hi,
                    "difference": np.nan if shift is None else shift.value,
                    "difference_lo": np.nan if shift is None else shift.lo,
                    "difference_hi": np.nan if shift is None else shift.hi,
                    "n": row.n,
                    "applies": row.n > 0,
                }
            )
    return pd.DataFrame(out)


def _address(row: Any, **other: str) -> tuple[Any, ...]:
    """What tells a row of one probe from the others, with some of it changed."""
    named = {name: getattr(row, name) for name in ("student", "stat", "site", "position")} | other
    places = (-1 if pd.isna(place) else int(place) for place in (row.layer, row.head))
    return (*named.values(), *places)


def _order(row: Any) -> tuple[Any, ...]:
    """By student, layer and head as in the table, conditions by number."""
    who = {"teacher": 0, "swap": 1}.get(row.student, 2)
    places = [-1 if pd.isna(place) else int(place) for place in (row.layer, row.head)]
    given = sorted(conditions(row.stat)[1].items())
    return (who, row.student, *places, len(given), [(k, str(type(v)), v) for k, v in given])


WORSE = {"passkey": -1, "needles": -1, "kv_lookup": -1, "induction": +1, "copying": +1}
"""Retrieval and copying: the direction in which the headline of the probe gets worse."""


def probes_of(table: pd.DataFrame) -> list[str]:
    """The probes that a table holds, in the order of the list of probes."""
    known = registry.probes().names()
    return [name for name in dict.fromkeys(table["metric"]) if name in known]


def probe_summary(
    table: pd.DataFrame,
    plan: SwapPlan,
    dictionary: Mapping[str, Any] | None = None,
) -> str:
    """The end of `mismatch probe` in a terminal; readable without colour."""
    parts = [subject(plan), *(f"  {line}" for line in plan_lines(plan))]
    parts += [f"  warning: {text}" for text in plan.warnings]
    return "\n".join([*parts, *answer_lines(table, dictionary)])


def answer_lines(table: pd.DataFrame, dictionary: Mapping[str, Any] | None = None) -> list[str]:
    """The headlines of every probe in a table, as lines of text; none without probes."""
    if not probes_of(table):
        return []
    found, parts = headlines(table, dictionary), []
    for metric in probes_of(table):
        rows = found[found["metric"] == metric]
        quantity = q.quantity(metric, dictionary)
        parts += ["", f"{metric}: {quantity.stat}, {quantity.unit}", columns(_lines(rows))]
        if len(rows) and rows.groupby("student").size().max() > ROWS:
            parts.append(f"  ... {len(rows)} rows in all, in the table")
    return parts


def named(row: Any) -> str:
    """`order_sensitivity change, layer 16, keep 0`: what a headline is of, without the student."""
    stat, given = conditions(row.stat)
    said = [
        f"{name} {getattr(row, name)}" for name in ("layer", "head") if pd.notna(getattr(row, name))
    ]
    said += [row.site] if row.site in ("resid_pre", "resid_mid", "mlp_out", "resid_post") else []
    said += [f"{k} {v if isinstance(v, str) else f'{v:g}'}" for k, v in given.items()]
    return ", ".join([f"{row.metric} {stat}", *said])


def _lines(rows: pd.DataFrame) -> list[list[str]]:
    lines = [["", "teacher", "student", "student - teacher", "95 % interval"]]
    for student, part in rows.groupby("student", sort=False):
        for row in part.head(ROWS).itertuples():
            name = ", ".join([str(student), *named(row).split(", ")[1:]])
            teacher = style.number(row.teacher)
            if not row.applies:
                lines.append([name, teacher, "not applicable", "", ""])
                continue
            band = intervals.band(row.difference_lo, row.difference_hi)
            alone = pd.isna(row.difference)  # read of this student only: its own interval
            value = style.interval(row.value, row.lo, row.hi) if alone else style.number(row.value)
            lines.append([name, teacher, value, _signed(row.difference), band])
    return lines


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + style.number(value)
