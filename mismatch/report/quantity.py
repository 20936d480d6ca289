"""From rows of the long table to what is drawn: a shift, its floor, and the kind of each cell.

A metric is turned into a shift (0 = as the teacher, further from 0 = worse) by the facts of its card:

    null 0, never negative      the value itself               rel_l2, lens_kl, frechet
    null 1, at most 1           1 - value                      cka, cosine
    null 1, unbounded           log2(value), signed            norm_ratio
    null 0, may be negative     the value itself, signed       a difference

The floor of a panel is the largest shift that the same metric reads at any of its sites when nothing
was changed (student `floor`). A cell at or below it is not told apart from no change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mismatch import registry
from mismatch.errors import UsageError
from mismatch.table import SITES

BLOCK_SITES = SITES[:5]
STATS = ("mean", "value", "debiased", "geo_mean", "p50")
"""Which statistic of a metric is drawn: the first of these that the table has."""


@dataclass(frozen=True)
class Quantity:
    """How one metric is drawn."""

    metric: str
    form: str
    """value, one_minus, log2 or signed"""
    unit: str
    summary: str = ""

    @property
    def signed(self) -> bool:
        return self.form in ("log2", "signed")

    @property
    def label(self) -> str:
        """`1 - cka`, `log2 norm_ratio`, `rel_l2`; with the unit where it has one."""
        name = {"one_minus": f"1 \u2212 {self.metric}", "log2": f"log2 {self.metric}"}.get(
            self.form, self.metric
        )
        return f"{name} ({self.unit})" if self.unit and self.form != "log2" else name

    def shift(self, value: pd.Series | np.ndarray | float) -> Any:
        """Values of the metric as shifts."""
        if self.form == "one_minus":
            return 1 - value
        if self.form == "log2":
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.log2(value)
        return value


def quantity(metric: str, dictionary: Mapping[str, Any] | None = None) -> Quantity:
    """How a metric is drawn, from the run's own dictionary or else the installed card.

    Raises:
        UsageError: no such metric.
    """
    facts = (dictionary or {}).get("metrics", {}).get(metric)
    if facts is None:
        card = registry.metrics().card(metric)
        facts = {"summary": card.summary, **card.facts}
    low, high = bounds(facts.get("range"))
    null = facts.get("null")
    unit = str(facts.get("unit") or "")
    if null == 1:
        form = "one_minus" if high <= 1 else "log2"
    else:
        form = "value" if low >= 0 else "signed"
    unit = "" if unit in ("1", "none", "ratio") else unit
    return Quantity(metric, form, unit, str(facts.get("summary") or ""))


def bounds(text: Any) -> tuple[float, float]:
    """The range of a card as two numbers: `[0, inf)`, `0..1` and (0, 1) are understood."""
    if isinstance(text, (tuple, list)):
        low, high = text
        return (-math.inf if low is None else low), (math.inf if high is None else high)
    found = re.findall(r"[-\u2212]?(?:\d+(?:\.\d+)?|inf\w*|\u221e|ln ?2)", str(text or ""))
    if len(found) != 2:
        return -math.inf, math.inf
    low, high = (_bound(word) for word in found)
    return low, high


def _bound(word: str) -> float:
    word = word.replace("\u2212", "-").replace("\u221e", "inf").replace("infinity", "inf")
    return math.log(2) if word.startswith("ln") else float(word)


def pick(table: pd.DataFrame, metric: str, *, stat: str | None = None, **where: Any) -> pd.DataFrame:
    """Rows of one metric and one statistic. A keyword is a column; None means: do not ask.

    Raises:
        UsageError: nothing is left; says what the table has.
    """
    rows = table[table["metric"] == metric]
    if rows.empty:
        has = ", ".join(sorted(table["metric"].unique()))
        raise UsageError(f"the table has no metric `{metric}`", hint=f"it has {has}")
    for column, wanted in {"position": "all", "stage": "surgery", **where}.items():
        if wanted is None:
            continue
        many = isinstance(wanted, (list, tuple, set))
        kept = rows[rows[column].isin(list(wanted) if many else [wanted])]
        if kept.empty:
            has = ", ".join(str(v) for v in rows[column].unique())
            raise UsageError(
                f"the table has no `{metric}` with {column}={wanted}", hint=f"it has {has}"
            )
        rows = kept
    rows = rows[rows["step"] == rows["step"].max()]
    if stat is None:
        stats = list(rows["stat"].unique())
        stat = next((s for s in STATS if s in stats), stats[0])
    return rows[rows["stat"] == stat]


def has(table: pd.DataFrame, metric: str, **where: Any) -> bool:
    """Whether `pick` would find rows."""
    try:
        pick(table, metric, **where)
    except UsageError:
        return False
    return True


def students(table: pd.DataFrame) -> list[str]:
    """The swap first, then the controls as the table has them; without the floor."""
    found = [s for s in dict.fromkeys(table["student"]) if s not in ("swap", "floor")]
    return ["swap", *found] if (table["student"] == "swap").any() else found


def swapped_layers(table: pd.DataFrame) -> list[int]:
    return sorted(int(x) for x in table.loc[table["swapped"], "layer"].dropna().unique())


def layer_count(table: pd.DataFrame) -> int:
    return int(table["layer"].max()) + 1 if table["layer"].notna().any() else 0


def floor_of(table: pd.DataFrame, q: Quantity, sites: Sequence[str]) -> float | None:
    """The largest shift at these sites when nothing was changed; None: not measured."""
    if not has(table, q.metric, student="floor", site=list(sites)):
        return None
    rows = pick(table, q.metric, student="floor", site=list(sites))
    shifts = np.abs(np.asarray(q.shift(rows["value"].to_numpy()), dtype=float))
    shifts = shifts[np.isfinite(shifts)]
    return float(shifts.max()) if shifts.size else None


def cells(
    table: pd.DataFrame,
    q: Quantity,
    *,
    student: str = "swap",
    mode: str = "free",
    sites: Sequence[str] = BLOCK_SITES,
    stage: str = "surgery",
) -> pd.DataFrame:
    """Every layer and site of one student, also where nothing was measured.

    Returns:
        Rows student, metric, stat, site, layer, value, lo, hi, n, swapped, shift, floor, kind;
        kind is value, floor (at or below it), zero (exactly no shift) or missing.
    """
    rows = pick(
        table, q.metric, student=student, mode=mode, stage=stage, site=list(sites), head=None
    )
    grid = pd.MultiIndex.from_product(
        [[s for s in SITES if s in sites], range(layer_count(table))], names=["site", "layer"]
    ).to_frame(index=False)
    grid["layer"] = grid["layer"].astype("Int16")
    columns = ["site", "layer", "value", "lo", "hi", "n"]
    out = grid.merge(rows[columns], on=["site", "layer"], how="left")
    out.insert(0, "student", student)
    out.insert(1, "metric", q.metric)
    out.insert(2, "stat", rows["stat"].iloc[0])
    out["swapped"] = out["layer"].isin(swapped_layers(table))
    out["shift"] = np.asarray(q.shift(out["value"].to_numpy(dtype=float)), dtype=float)
    floor = floor_of(table, q, sites)
    out["floor"] = np.nan if floor is None else floor
    size = out["shift"].abs()
    out["kind"] = np.select(
        [size.isna(), size == 0, size <= (floor or 0.0)], ["missing", "zero", "floor"], "value"
    )
    return out
