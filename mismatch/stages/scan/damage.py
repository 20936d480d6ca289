"""What each replaced layer costs on each task, larger is worse: the numbers of the atlas, of its table and its words.

Text is read as KL, a distance. On repeated tokens, a passkey, needles and lists the right token is known, so what is
read is what it lost: nats per token of the second copy, per key, per token of the answer. That has a sign: a layer
whose loss helps is on the other side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mismatch.errors import UsageError
from mismatch.report import intervals
from mismatch.stages.scan.plan import ScanPlan


@dataclass(frozen=True)
class Panel:
    """How one task is drawn. `sign` turns its statistic into damage: larger is worse."""

    task: str
    metric: str
    stat: str
    sign: int
    title: str
    unit: str
    signed: bool


PANELS = (
    Panel("text", "kl", "mean", 1, "Text: output KL", "nats per token", False),
    Panel(
        "induction", "induction", "nll_second_minus_teacher", 1,
        "Induction: what the second copy of random tokens lost", "nats per token", True,
    ),
    Panel(
        "passkey", "passkey", "logprob_minus_teacher", -1,
        "Retrieval: what the passkey lost", "nats per key", True,
    ),
    Panel(
        "needles", "needles", "logprob_minus_teacher", -1,
        "Needles: what facts in real text lost", "nats per answer token", True,
    ),
    Panel(
        "kv_lookup", "kv_lookup", "logprob_minus_teacher", -1,
        "Look-up: what pairs of a list lost", "nats per answer token", True,
    ),
)  # fmt: skip


def atlas_data(
    table: pd.DataFrame,
    *,
    plan: ScanPlan | None = None,
    dictionary: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Every layer of every mechanism on every task, also where nothing could be measured.

    Args:
        table: the long table of a scan.
        plan, dictionary: not needed; as the other figures take them.

    Returns:
        Rows task, unit, student, layer (and head, of a scan by heads), value, lo, hi, over, n, kind. `value` is the
        damage in nats, larger is worse;
        `kind` is value, zero (exactly no change), unclear (its interval holds 0) or missing (not scanned, not
        applicable, or not finite).

    Raises:
        UsageError: the table is not that of a scan.
    """
    found = []
    for panel in PANELS:
        rows = _rows(table, panel.metric, panel.stat)
        if rows.empty:
            continue
        names = place(rows)
        ends = [range(int(rows[name].max()) + 1) for name in names]
        grid = pd.MultiIndex.from_product(
            [list(dict.fromkeys(rows["student"])), *ends], names=["student", *names]
        ).to_frame(index=False)
        grid = grid.astype(dict.fromkeys(names, "Int16"))
        cells = grid.merge(
            rows[["student", *names, "value", "lo", "hi", "over", "n"]],
            on=["student", *names],
            how="left",
        )
        if panel.sign < 0:
            cells["value"], cells["lo"], cells["hi"] = -cells["value"], -cells["hi"], -cells["lo"]
        cells["over"] = cells["over"].fillna("")
        cells["value"] += 0.0  # no negative zero
        cells.insert(0, "task", panel.task)
        cells.insert(1, "unit", panel.unit)
        value = cells["value"]
        holds = (cells["lo"] <= 0) & (cells["hi"] >= 0) & panel.signed
        cells["kind"] = np.select(
            [value.isna(), value == 0, holds], ["missing", "zero", "unclear"], "value"
        )
        found.append(cells)
    if not found:
        raise UsageError("the table holds no scan", hint="make one by `mismatch scan`")
    return pd.concat(found, ignore_index=True)


Place = int | tuple[int, int]
"""A layer, or a layer and a head."""


def place(rows: pd.DataFrame) -> list[str]:
    """The columns that say where a cell is: `layer`, and `head` in a scan by heads."""
    return ["layer", "head"] if "head" in rows and rows["head"].notna().any() else ["layer"]


def place_of(row: Any) -> Place:
    """Where a row of `atlas_data` is, of its `itertuples`."""
    return (int(row.layer), int(row.head)) if "head" in row._fields else int(row.layer)


def unit_of(plan: ScanPlan | None) -> str:
    """What was replaced at a time: `layer`, `head` or `kv head`."""
    return "layer" if plan is None else plan.by.replace("-", " ")


def told(at: Place, unit: str) -> str:
    """`layer 18`, `layer 18 kv head 2`."""
    return f"layer {at}" if isinstance(at, int) else f"layer {at[0]} {unit} {at[1]}"


def _rows(table: pd.DataFrame, metric: str, stat: str) -> pd.DataFrame:
    return table[
        (table["stage"] == "scan")
        & (table["metric"] == metric)
        & (table["stat"] == stat)
        & (table["position"] == "all")
        & table["layer"].notna()
    ]


def students(table: pd.DataFrame, plan: ScanPlan | None = None) -> dict[str, bool]:
    """The mechanisms in the order in which they were asked for, each with whether it is a control; controls last."""
    here = list(
        dict.fromkeys(table.loc[(table["stage"] == "scan") & table["layer"].notna(), "student"])
    )
    said = {} if plan is None else {column.name: column.control for column in plan.columns}
    if not said:
        said = {name: table["stat"].eq(f"mean_minus_{name}").any() for name in here}
    order = sorted(said, key=lambda name: said[name])
    return {name: bool(said[name]) for name in order if name in here}


def paired(table: pd.DataFrame, panel: Panel) -> pd.DataFrame:
    """Each mechanism minus each control in the same layer, on the same documents or keys.

    Returns:
        Rows student, layer (and head), control, value, lo, hi; larger is worse than the control.
    """
    stem = panel.stat.removesuffix("_minus_teacher") + "_minus_"
    rows = table[
        (table["stage"] == "scan")
        & (table["metric"] == panel.metric)
        & (table["position"] == "all")
        & table["layer"].notna()
        & table["stat"].str.startswith(stem)
        & (table["stat"] != panel.stat)
    ]
    found = rows[["student", *place(rows), "value", "lo", "hi"]].copy()
    found.insert(found.columns.get_loc("value"), "control", rows["stat"].str.removeprefix(stem))
    if panel.sign < 0:
        found["value"], found["lo"], found["hi"] = -found["value"], -found["hi"], -found["lo"]
    return found.reset_index(drop=True)


def against(table: pd.DataFrame, panel: Panel) -> pd.DataFrame:
    """In how many layers (or heads) a mechanism is better or worse than a control, as far as the paired intervals tell.

    Returns:
        Rows student, control, better, worse, open (not told apart), none (no interval).
    """
    rows = paired(table, panel)
    sides = [intervals.side(lo, hi) for lo, hi in zip(rows["lo"], rows["hi"], strict=True)]
    kinds = {"better": "below", "worse": "above", "open": "open", "none": "none"}
    for kind, name in kinds.items():
        rows[kind] = [at == name for at in sides]
    return rows.groupby(["student", "control"], sort=False)[list(kinds)].sum().reset_index()
