"""A run in words: the verdict, the plan, the worst sites; and all of it as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mismatch.errors import UsageError
from mismatch.report import intervals
from mismatch.report import quantity as q
from mismatch.report.style import number
from mismatch.report.words import columns, plan_lines, subject
from mismatch.runs.plan import SwapPlan
from mismatch.stages.trace.report.controls_figure import output_data

WORST = ("rel_l2", "cka_minibatch", "norm_ratio")
"""The columns of the table of worst sites; the first one ranks them."""


def verdict(
    table: pd.DataFrame, dictionary: Mapping[str, Any] | None = None, who: str = "swap"
) -> str:
    """One or two sentences: how far the output moved, and against what that is much or little.

    Args:
        table: the long table.
        dictionary: the run's metrics.json.
        who: what moves it, as `mismatch.report.words.subject` calls it.
    """
    try:
        data = output_data(table, dictionary=dictionary)
    except UsageError:
        return "The output shift was not measured."
    means = data[data["against"] == ""].set_index("student")
    if "swap" not in means.index:
        return "No swap was measured, only controls."
    swap = means.loc["swap"]
    floor = float(means.loc["floor", "value"]) if "floor" in means.index else 0.0
    if swap["value"] == 0:
        return f"The {who} changes nothing: the output KL is exactly 0."
    said = (
        f"The {who} moves the output by {intervals.said(swap['value'], swap['lo'], swap['hi'])} "
        "nats per token"
    )
    if swap["value"] <= floor:
        return f"{said}, not more than the floor ({number(floor)}): no shift is shown."
    pairs = data[data["against"] != ""].set_index("against")
    beside = [c for c in ("zero", "mean") if c in pairs.index and c in means.index]
    if not beside:
        return f"{said}. No control was run to compare it with."
    words: dict[str, list[str]] = {}
    for control in beside:
        words.setdefault(_against(pairs.loc[control]), []).append(
            f"{_DONE[control]} ({number(means.loc[control, 'value'])})"
        )
    return f"{said}: " + ", ".join(f"{how} {' and '.join(w)}" for how, w in words.items()) + "."


_DONE = {"zero": "deleting the module", "mean": "replacing it by its mean"}


def _against(pair: pd.Series) -> str:
    """What the paired difference says; only an interval without 0 says more or less."""
    return {
        "above": "worse than",
        "below": "better than",
        "open": "not told apart from",
        "none": f"{intervals.NONE} of the difference to",
    }[intervals.side(pair["lo"], pair["hi"])]


def worst_sites(
    table: pd.DataFrame, top: int | None = 10, dictionary: Mapping[str, Any] | None = None
) -> pd.DataFrame:
    """The layers and sites that moved most, by relative L2, free running.

    `share_of_mean` is the shift over that of the control `mean` at the same site (1 = as bad as
    replacing the module by its mean). `resid_pre` is left out: it is `resid_post` of the layer before.

    Returns:
        Rows layer, site, swapped, one column for each metric of `WORST` that the table has,
        share_of_mean where that control ran; at most `top` (None: all), without what is at the floor.
    """
    sites = [s for s in q.BLOCK_SITES if s != "resid_pre"]
    first, *others = (q.quantity(m, dictionary) for m in WORST)
    if not q.has(table, first, student="swap", mode="free", site=sites):
        return pd.DataFrame(columns=["layer", "site", "swapped"])
    cells = q.cells(table, first, sites=sites)
    cells = cells[cells["kind"] == "value"]
    out = cells[["layer", "site", "swapped"]].assign(**{first.metric: cells["value"]})
    for quantity in others:
        if q.has(table, quantity, student="swap", mode="free", site=sites):
            more = q.cells(table, quantity, sites=sites)[["layer", "site", "value"]]
            more = more.rename(columns={"value": quantity.metric})
            out = out.merge(more, on=["layer", "site"], how="left")
    if q.has(table, first, student="mean", mode="free", site=sites):
        mean = q.cells(table, first, student="mean", sites=sites)[["layer", "site", "value"]]
        out = out.merge(mean.rename(columns={"value": "of"}), on=["layer", "site"], how="left")
        out["share_of_mean"] = out[first.metric] / out.pop("of").replace(0, np.nan)
    out = out.sort_values(first.metric, ascending=False, kind="stable")
    return out.head(len(out) if top is None else top).reset_index(drop=True)


def summary(
    table: pd.DataFrame,
    plan: SwapPlan,
    findings: Iterable[Mapping[str, Any]],
    path: Path | str | None = None,
    dictionary: Mapping[str, Any] | None = None,
) -> str:
    """The end of a trace in a terminal; readable without colour.

    Args:
        table: the long table.
        plan: what was replaced.
        findings: as in findings.json.
        path: of the run folder; the last line, if given.
        dictionary: the run's metrics.json; default: the cards of the installed metrics.
    """
    parts = [subject(plan), *(f"  {line}" for line in plan_lines(plan))]
    parts += [f"  warning: {text}" for text in plan.warnings]
    parts += ["", *_output_lines(table, dictionary, subject(plan))]
    worst = worst_sites(table, dictionary=dictionary)
    if len(worst):
        starred = " (* swapped layer)" if plan.clauses else ""
        parts += ["", f"worst sites, free running{starred}", columns(_worst_rows(worst))]
    parts += ["", "findings", *_finding_lines(findings)]
    if path is not None:
        parts += ["", str(path)]
    return "\n".join(parts)


def _output_lines(table: pd.DataFrame, dictionary: Mapping[str, Any] | None, who: str) -> list[str]:
    try:
        data = output_data(table, dictionary=dictionary)
    except UsageError:
        return ["output shift: not measured"]
    rows = [["", "KL", "interval"]]
    for row in data.itertuples():
        name = (
            f"swap - {row.against}" if row.against else {"swap": who}.get(row.student, row.student)
        )
        sign = "+" if row.against and row.value > 0 else ""
        rows.append([name, f"{sign}{number(row.value)}", intervals.band(row.lo, row.hi)])
    return [f"output shift, nats per token; {intervals.named(data['over'])}", columns(rows)]


def _worst_rows(worst: pd.DataFrame) -> list[list[str]]:
    numbers = [c for c in worst if c not in ("layer", "site", "swapped")]
    heads = ["layer site", *(c.replace("_", " ") for c in numbers)]
    rows = [heads]
    for _, row in worst.iterrows():
        star = "*" if row["swapped"] else " "
        rows.append([f"{row['layer']:>4}{star} {row['site']}", *(number(row[c]) for c in numbers)])
    return rows


def _finding_lines(findings: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = []
    for finding in findings:
        lines.append(f"  {finding['severity'].upper():<6} {finding['title']}")
        lines.append(f"         {finding['text']}")
        if finding.get("next"):
            lines.append(f"         -> {finding['next']}")
    return lines or ["  none"]
