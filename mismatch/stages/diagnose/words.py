"""A diagnosis in words, below its verdict: the shares by cause, the findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mismatch.report import intervals, style
from mismatch.report.words import columns
from mismatch.stages.diagnose.figure import PANELS, diagnosis_data, percent
from mismatch.stages.diagnose.plan import DiagnosisPlan


def diagnosis_summary(plan: DiagnosisPlan, findings: Sequence[Mapping[str, Any]]) -> str:
    """The end of `mismatch diagnose` in a terminal, below the verdict; readable without colour.

    Args:
        plan: what the run found.
        findings: as in findings.json.
    """
    found = plan.diagnosis
    parts = [f"warning: {text}" for text in plan.warnings]
    if found.corrections:
        data = diagnosis_data(plan=plan)
        for panel, title in PANELS.items():
            rows = data[data["panel"] == panel]
            if rows.empty:
                continue
            lines = [[_name(row), *_cells(row)] for row in rows.itertuples()]
            parts += [f"{title}, % of the KL", columns(lines), ""]
        parts += [f"not applicable  {text}" for text in found.not_applicable]
    for finding in findings:
        parts += [
            f"  {finding['severity'].upper():<6} {finding['title']}",
            f"         {finding['text']}",
        ]
        if finding.get("next"):
            parts.append(f"         -> {finding['next']}")
    return "\n".join(parts)


def _name(row: Any) -> str:
    return f"{row.says}{' *' if row.leading else ''}"


def _cells(row: Any) -> list[str]:
    if row.does_nothing:
        return ["0", "no effect", ""]
    band = intervals.band(row.lo, row.hi, percent)
    kl = "" if pd.isna(row.kl) else f"KL {style.number(row.kl)}"
    return [percent(row.share), band, kl]
