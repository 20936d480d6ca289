"""From rows of the long table to what is drawn: a shift, its floor, and the kind of each cell.

The headline statistic of every metric is a shift: 0 at teacher == student, further from 0 = worse.
The card says whether it has a sign: a metric that is better lower and never negative is a distance,
any other (`norm_ratio`, `nll`) is drawn around 0.

The floor of a panel is the largest shift that the same metric reads at any of its sites when nothing
was changed (student `floor`). A cell at or below it is not told apart from no change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mismatch import registry
from mismatch.errors import UsageError
from mismatch.runs.site_names import BLOCK_SITES, SITES

CONTROLS = ("identity", "zero", "mean", "skip", "linear", "random")
"""The order in which controls are listed; others follow by name."""


@dataclass(frozen=True)
class Quantity:
    """How one metric is drawn."""

    metric: str
    stat: str
    unit: str
    signed: bool
    summary: str = ""
    blind: str = ""

    @property
    def label(self) -> str:
        return f"{self.metric} ({self.unit})" if self.unit else self.metric


def quantity(metric: str, dictionary: Mapping[str, Any] | None = None) -> Quantity:
    """How a metric is drawn, by the run's own dictionary or else the installed card.

    Raises:
        UsageError: no such metric.
    """
    facts = (dictionary or {}).get("metrics", {}).get(metric)
    if facts is None:
        if ":" in metric:  # out of a file: it is not looked for
            raise UsageError(f"metrics.json does not describe the metric `{metric}`")
        card = registry.read_card(metric)
        facts = {"summary": card.summary, **card.facts}
    negative = str(facts.get("range", "[0")).strip()[1:2] not in ("0", "")
    return Quantity(
        metric=metric,
        stat=str(facts.get("headline", "mean")),
        unit=str(facts.get("unit") or ""),
        signed=facts.get("better") != "lower" or negative,
        summary=str(facts.get("summary") or ""),
        blind=str(facts.get("blind") or ""),
    )


def pick(table: pd.DataFrame, quantity: Quantity, **where: Any) -> pd.DataFrame:
    """The rows of a metric's headline statistic, of the last step.

    A keyword is a column and what it must be (or a list of that); None: anything. Where not said,
    `position` is "all", `stage` "surgery" and `stat` the headline.

    Raises:
        UsageError: nothing is left; says what the table has.
    """
    rows = table[table["metric"] == quantity.metric]
    if rows.empty:
        found = ", ".join(sorted(table["metric"].unique()))
        raise UsageError(f"the table has no metric `{quantity.metric}`", hint=f"it has {found}")
    asked = {"position": "all", "stage": "surgery", "stat": quantity.stat, **where}
    for column, wanted in asked.items():
        if wanted is None:
            continue
        several = isinstance(wanted, (list, tuple, set))
        kept = rows[rows[column].isin(list(wanted) if several else [wanted])]
        if kept.empty:
            found = ", ".join(str(v) for v in rows[column].unique())
            raise UsageError(
                f"the table has no `{quantity.metric}` with {column}={wanted}",
                hint=f"it has {found}",
            )
        rows = kept
    return rows[rows["step"] == rows["step"].max()]


def has(table: pd.DataFrame, quantity: Quantity, **where: Any) -> bool:
    """Whether `pick` would find rows."""
    try:
        pick(table, quantity, **where)
    except UsageError:
        return False
    return True


def students(table: pd.DataFrame) -> list[str]:
    """The swap first, then the controls; without the floor and the teacher itself."""
    order = ("swap", *CONTROLS)
    found = set(table["student"]) - {"floor", "teacher"}
    return sorted(found, key=lambda s: (order.index(s) if s in order else len(order), s))


def swapped_layers(table: pd.DataFrame) -> list[int]:
    return sorted(int(x) for x in table.loc[table["swapped"], "layer"].dropna().unique())


def layer_count(table: pd.DataFrame) -> int:
    return int(table["layer"].max()) + 1 if table["layer"].notna().any() else 0


def floor_of(table: pd.DataFrame, quantity: Quantity, sites: Sequence[str]) -> float | None:
    """The largest shift at these sites when nothing was changed; None: not measured."""
    if not has(table, quantity, student="floor", site=list(sites)):
        return None
    shifts = pick(table, quantity, student="floor", site=list(sites))["value"].abs()
    shifts = shifts[np.isfinite(shifts)]
    return float(shifts.max()) if len(shifts) else None


def cells(
    table: pd.DataFrame,
    quantity: Quantity,
    *,
    student: str = "swap",
    mode: str = "free",
    sites: Sequence[str] = BLOCK_SITES,
    stage: str = "surgery",
) -> pd.DataFrame:
    """Every layer and site of one student, also where nothing was measured.

    Returns:
        Rows student, metric, stat, site, layer, value, lo, hi, n, swapped, floor, kind; kind is
        value, floor (at or below it), zero (exactly no shift) or missing.

    Raises:
        UsageError: nothing of it was measured.
    """
    rows = pick(table, quantity, student=student, mode=mode, stage=stage, site=list(sites))
    rows = rows[rows["layer"].notna() & rows["head"].isna()]
    grid = pd.MultiIndex.from_product(
        [[s for s in SITES if s in sites], range(layer_count(table))], names=["site", "layer"]
    ).to_frame(index=False)
    grid["layer"] = grid["layer"].astype("Int16")
    out = grid.merge(
        rows[["site", "layer", "value", "lo", "hi", "n"]], on=["site", "layer"], how="left"
    )
    out.insert(0, "student", student)
    out.insert(1, "metric", quantity.metric)
    out.insert(2, "stat", quantity.stat)
    out["swapped"] = out["layer"].isin(swapped_layers(table))
    floor = floor_of(table, quantity, sites)
    out["floor"] = np.nan if floor is None else floor
    size = out["value"].abs()
    out["kind"] = np.select(
        [size.isna(), size == 0, size <= (floor or 0.0)], ["missing", "zero", "floor"], "value"
    )
    return out
