"""What each branch alone retrieves, before the repair and after it: needles beyond the local part. No torch."""

from __future__ import annotations

import pandas as pd

from mismatch.report import style
from mismatch.report.page import Html, grid, join, reading, tag
from mismatch.runs.table import conditions
from mismatch.stages.repair.plan import ALL, NONE


def needles_by_branch(table: pd.DataFrame) -> pd.DataFrame:
    """What needles beyond the local part read with some of the branches, before the repair and after it.

    Returns:
        Rows kept, stage (surgery: as it was swapped; repair), value, lo, hi: the student minus the teacher, nats per
        token of the answer.
    """
    rows = table[
        (table["metric"] == "needles")
        & (table["student"] == "swap")
        & table["stat"].str.startswith("logprob_minus_teacher[kept=")
    ]
    kept = rows["stat"].map(lambda stat: str(conditions(stat)[1]["kept"]))
    found = rows[["stage", "value", "lo", "hi"]].assign(kept=kept)
    order = {ALL: 0, NONE: 2}
    return found.sort_values(
        "kept", key=lambda names: names.map(lambda n: order.get(n, 1)), kind="stable"
    )


def needle_lines(table: pd.DataFrame) -> list[str]:
    """`needles beyond the local part, minus the teacher: all -1.9 -> -0.2 [..]; local -2.1 -> -2.0 [..]`."""
    found = needles_by_branch(table)
    said = []
    for kept, part in found.groupby("kept", sort=False):
        at = {row.stage: row for row in part.itertuples()}
        if {"surgery", "repair"} <= set(at):
            after = at["repair"]
            said.append(
                f"{kept} {style.number(at['surgery'].value)} -> {style.interval(after.value, after.lo, after.hi)}"
            )
    if not said:
        return []
    return [
        "needles beyond the local part by the branches that are kept, minus the teacher, swap -> repaired, nats per "
        f"token: {'; '.join(said)}"
    ]


def needle_section(table: pd.DataFrame) -> Html:
    """The same as a table; nothing where it was not asked."""
    found = needles_by_branch(table)
    rows = []
    for kept, part in found.groupby("kept", sort=False):
        at = {row.stage: row for row in part.itertuples()}
        both = (at.get("surgery"), at.get("repair"))
        rows.append((kept, *("" if r is None else reading(r.value, r.lo, r.hi) for r in both)))
    if not rows:
        return tag("p", "No needle beyond the local part was asked for.")
    words = (
        "Needles that lie beyond what the local part holds: log-probability of the answer minus the teacher's, nats "
        "per token, with all branches, one alone, and none. Text hardly asks for what a far branch holds."
    )
    heads = ("branches that are kept", "swap − teacher, paired", "repaired − teacher, paired")
    return join([tag("p", words), grid(heads, rows, numbers=(1, 2))])
