"""What findings rest on: the table of one run, what was replaced, and the look-ups that the rules share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from mismatch.runs.plan import Apart, Replaced
from mismatch.stages.swapped import reach

Profile = dict[int, pd.Series]
"""The row of each range of positions, by its first position, in order."""


@dataclass(frozen=True)
class Evidence:
    """The table of one run, and what was replaced."""

    table: pd.DataFrame
    swapped: tuple[int, ...]
    n_layers: int
    model: str
    clauses: tuple[Replaced, ...]
    apart: Apart | None = None
    """What else differs in a student that was trained elsewhere."""

    def row(self, **where: Any) -> pd.Series | None:
        """The single row with these values, or None. `layer=None` asks for rows without a layer."""
        where = {"student": "swap", "mode": "free", "stat": "mean", "position": "all", **where}
        rows = self.table
        for column, value in where.items():
            rows = rows[rows[column].isna() if value is None else rows[column] == value]
        return None if rows.empty else rows.iloc[0]

    def worst(self, metric: str, **where: Any) -> pd.Series | None:
        """Of the updates that the swap feeds, the row with an interval that is largest in magnitude, if any."""
        rows = (
            self.row(layer=layer, site=site, metric=metric, **where)
            for layer in self.swapped
            for site in self.update_sites()
        )
        found = [row for row in rows if row is not None and not pd.isna(row.lo)]
        return max(found, key=lambda row: abs(row.value), default=None)

    def kl(self, student: str = "swap", **where: Any) -> pd.Series | None:
        return self.row(student=student, metric="kl", site="logits", **where)

    def by_position(self, student: str) -> Profile:
        """The KL of a student by position."""
        t = self.table
        rows = t[
            (t.student == student)
            & (t["mode"] == "free")
            & (t.metric == "kl")
            & (t.site == "logits")
            & (t.stat == "mean")
            & (t.position != "all")
        ]
        starts = rows.position.str.split("-").str[0].astype(int)
        return {int(starts[at]): rows.loc[at] for at in starts.sort_values().index}

    def reach(self) -> int:
        """Tokens that the local parts of all swapped mechanisms hold: up to there they lack no context."""
        return reach(self.clauses)

    def slots(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c.slot for c in self.clauses))

    def update_sites(self) -> tuple[str, ...]:
        """The updates that the swapped slots feed."""
        sites = []
        for slot in self.slots():
            sites.append(
                "mlp_out"
                if slot in ("mlp", "norm2", "norm2_post", "gate_proj", "up_proj", "down_proj")
                else "attn_out"
            )
        return tuple(dict.fromkeys(sites))
