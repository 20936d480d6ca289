"""From the table to findings: what the numbers of one trace say, in words, with the numbers they rest on.

Each rule is a function from the evidence to at most one finding. A rule speaks only from differences whose interval
excludes zero, and never from a value at or below the floor.

| rule | question |
|---|---|
| `worth_it` | is the swap better than deleting the module (`zero`, `mean`)? paired interval |
| `local_error` | how much of the module's update does the replacement get right, on the teacher's own input? |
| `scale` | is the update of another size? |
| `depth` | does the shift grow or heal behind the swap? |
| `late_tokens` | does it hurt more the later the token, more than deleting the module (`zero`) does? |
| `most_changed` | of a fine-tune, in which nothing was swapped: which block changed most? |
| `retrieval` | where probes were asked: is retrieval lost, which text does not show? |
| `premise` | is this layer's update a small correction to the stream, as deep models expect? |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mismatch.report import intervals
from mismatch.runs.plan import Apart, Replaced
from mismatch.spec.heads import named
from mismatch.stages.base import SEVERITIES, Finding
from mismatch.stages.lost_retrieval import lost_retrieval
from mismatch.stages.swapped import reach

Profile = dict[int, pd.Series]
"""The row of each range of positions, by its first position, in order."""

SMALL = 0.1
"""Share of the KL of `zero` up to which damage counts as low."""


@dataclass(frozen=True)
class Evidence:
    """The table of one run, and what was replaced, with the look-ups that the rules share."""

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


def findings_of(evidence: Evidence) -> list[Finding]:
    """Every finding of the rules above, worst first."""
    rules = RULES if evidence.clauses else OF_A_FINE_TUNE
    found = [finding for rule in rules if (finding := rule(evidence)) is not None]
    return sorted(found, key=lambda f: -SEVERITIES.index(f.severity))


def worth_it(e: Evidence) -> Finding | None:
    swap, zero = e.kl(), e.kl("zero")
    if swap is None:
        return None
    floor = e.kl("floor")
    floor_value = 0.0 if floor is None else float(floor.value)
    numbers: dict[str, float | str] = {
        "kl": swap.value,
        "kl_lo": swap.lo,
        "kl_hi": swap.hi,
        "floor": floor_value,
    }
    if swap.value <= floor_value:
        return Finding(
            "info",
            "no shift",
            f"The output does not change: KL {swap.value:.2g} nats, at the floor.",
            numbers,
        )
    said = f"KL {intervals.said(swap.value, swap.lo, swap.hi)} nats per token"
    if zero is None or not zero.value > 0:
        return Finding(
            "medium",
            "the output shifts",
            f"{said}; no deletion control was measured to compare it with."
            if e.clauses
            else f"{said}, against the model that it was made from.",
            numbers,
        )
    share = swap.value / zero.value
    difference = e.kl(stat="mean_minus_zero")
    numbers |= {"kl_zero": zero.value, "share_of_zero": share}
    if difference is None or intervals.side(difference.lo, difference.hi) == "none":
        return Finding(
            "info",
            "the output shifts, and there is too little text to judge it",
            f"{said}; deleting the module costs {zero.value:.3g}. Of the difference {intervals.WHY_NONE}.",
            numbers,
        )
    numbers |= {
        "minus_zero": difference.value,
        "minus_zero_lo": difference.lo,
        "minus_zero_hi": difference.hi,
    }
    paired = f"swap minus zero {difference.value:+.3g} {intervals.band(difference.lo, difference.hi, '{:+.3g}'.format)}"
    if difference.lo > 0:
        return Finding(
            "high",
            "worse than deleting the module",
            f"{said}; deleting the module costs {zero.value:.3g} ({paired}). {_blamed(e)}",
            numbers,
            _parallel(e),
        )
    if difference.hi >= 0:
        return Finding(
            "high",
            "no better than deleting the module",
            f"{said}; deleting the module costs {zero.value:.3g} ({paired}: the interval contains 0).",
            numbers,
            _parallel(e),
        )
    severity = "high" if share > 0.5 else "medium" if share > SMALL else "low"
    return Finding(
        severity,
        f"{share:.0%} of the damage of deleting the module",
        f"{said}; deleting the module costs {zero.value:.3g} ({paired}).",
        numbers,
        _parallel(e) if severity == "high" else None,
    )


def local_error(e: Evidence) -> Finding | None:
    worst, at = None, (0, "")
    for layer in e.swapped:
        for site in e.update_sites():
            row = e.row(mode="forced", layer=layer, site=site, metric="rel_l2")
            if row is not None and (worst is None or row.value > worst.value):
                worst, at = row, (layer, site)
    if worst is None or worst.value == 0:
        return None
    layer, site = at
    numbers: dict[str, float | str] = {"layer": layer, "site": site, "rel_l2_forced": worst.value}
    if worst.value >= 1:
        return Finding(
            "high",
            f"layer {layer}: the update misses its target by more than its own size",
            f"On the teacher's own input, {site} of layer {layer} is off by {worst.value:.2f} times its norm; an "
            "update of zero would be off by 1.",
            numbers,
        )
    return Finding(
        "medium" if worst.value > 0.3 else "low",
        f"layer {layer}: local error {worst.value:.0%} of the update",
        f"On the teacher's own input, {site} of layer {layer} is off by {worst.value:.2f} times its norm "
        "(0 = exact, 1 = as far as an update of zero).",
        numbers,
    )


def scale(e: Evidence) -> Finding | None:
    worst, at = None, (0, "")
    for layer in e.swapped:
        for site in e.update_sites():
            row = e.row(mode="forced", layer=layer, site=site, metric="norm_ratio")
            if row is not None and (worst is None or abs(row.value) > abs(worst.value)):
                worst, at = row, (layer, site)
    if worst is None or not abs(worst.value) > 0.25:
        return None
    layer, site = at
    factor = 2.0**worst.value
    return Finding(
        "medium" if abs(worst.value) > 1 else "low",
        f"layer {layer}: the update is {factor:.2f} times its size",
        f"{site} of layer {layer} has {factor:.2f} times the norm of the original (geometric mean over tokens). "
        "Scale and mean are what a closed-form correction repairs first.",
        {"layer": layer, "site": site, "norm_factor": factor},
    )


def depth(e: Evidence) -> Finding | None:
    if not e.swapped:
        return None
    last = e.n_layers - 1
    after = max(e.swapped)
    first_row = e.row(layer=after, site="resid_post", metric="rel_l2")
    last_row = e.row(layer=last, site="resid_post", metric="rel_l2")
    if first_row is None or last_row is None or after == last or first_row.value == 0:
        return None
    growth = last_row.value / first_row.value
    word = "grows" if growth > 1.1 else "heals" if growth < 0.9 else "stays"
    return Finding(
        "medium" if growth > 2 else "info",
        f"the shift {word} behind the swap",
        f"The stream is off by {first_row.value:.3f} of its norm leaving layer {after} and by {last_row.value:.3f} "
        f"leaving layer {last} ({growth:.2f} times).",
        {"rel_l2_after_swap": first_row.value, "rel_l2_last": last_row.value, "growth": growth},
    )


def late_tokens(e: Evidence) -> Finding | None:
    """Judged against `zero`, whose own profile says what the module does at early and at late tokens anyway, and only
    where the mechanism's local part no longer holds all tokens: before, a late token cannot lose more."""
    swap, zero = e.by_position("swap"), e.by_position("zero")
    bins = [start for start in swap if start > 0 and start in zero]
    if len(bins) < 2:
        return None
    last = bins[-1]
    beyond = [start for start in bins[:-1] if start >= e.reach()]
    if beyond and _rises(swap, zero, beyond[0], last):
        first, severity, title = beyond[0], "medium", "late tokens suffer more"
        why = "What is lost is reached over distance: context or position."
    elif _rises(swap, zero, last, bins[0]):
        first, severity, title = bins[0], "info", "early tokens suffer more"
        why = "The first tokens lose most: look at the sink (position 0) and at an empty memory."
    else:
        return None
    early, late = swap[first], swap[last]
    return Finding(
        severity,
        title,
        f"KL {early.value:.3g} at positions {early.position}, {late.value:.3g} at {late.position}; deleting the module "
        f"costs {zero[first].value:.3g} and {zero[last].value:.3g} there. {why}",
        {
            "kl_early": early.value,
            "kl_late": late.value,
            "kl_zero_early": zero[first].value,
            "kl_zero_late": zero[last].value,
            "early": early.position,
            "late": late.position,
        },
    )


def _rises(swap: Profile, zero: Profile, low: int, high: int) -> bool:
    """Whether the KL of the swap is larger at the bin `high` than at `low`: beyond both intervals, in a larger ratio
    than under `zero`, and by a share of what deleting costs there that is not small."""
    a, b = swap[low], swap[high]
    apart = b.lo > a.hi and b.value - a.value > SMALL * zero[high].value
    return bool(apart and b.lo * zero[low].value > a.hi * zero[high].value)


def retrieval(e: Evidence) -> Finding | None:
    return lost_retrieval(e.table, e.clauses, e.model)


def premise(e: Evidence) -> Finding | None:
    worst, at = None, (0, "")
    for layer in e.swapped:
        for site in e.update_sites():
            row = e.row(layer=layer, site=site, metric="update_size", stat="teacher")
            if row is not None and (worst is None or row.value > worst.value):
                worst, at = row, (layer, site)
    if worst is None or not worst.value > 0.3:
        return None
    layer, site = at
    return Finding(
        "medium",
        f"layer {layer} is not a small correction",
        f"{site} of the original has {worst.value:.2f} times the norm of the stream it is added to: an error here "
        "is an error of the stream.",
        {"layer": layer, "site": site, "update_size": worst.value},
    )


def most_changed(e: Evidence) -> Finding | None:
    """Of the blocks of a fine-tune, each on the teacher's own input: whose update moved most."""
    rows = e.table
    rows = rows[
        (rows["student"] == "swap")
        & (rows["mode"] == "forced")
        & (rows["metric"] == "rel_l2")
        & (rows["stat"] == "mean")
        & (rows["position"] == "all")
        & rows["site"].isin(("attn_out", "mlp_out"))
    ]
    if rows.empty or not rows["value"].max() > 0:
        return None
    worst, middle = rows.loc[rows["value"].idxmax()], rows["value"].median()
    return Finding(
        "info",
        f"layer {worst.layer:.0f} changed most: {worst.site} is off by {worst.value:.0%} of its norm",
        f"Each block that differs was run on the teacher's own input. {worst.site} of layer {worst.layer:.0f} is off "
        f"by {worst.value:.3f} times its norm; the middle one of {len(rows)} updates by {middle:.3f}.",
        {
            "layer": float(worst.layer),
            "site": str(worst.site),
            "rel_l2_forced": worst.value,
            "median": middle,
        },
    )


RULES: tuple[Callable[[Evidence], Finding | None], ...] = (
    worth_it,
    local_error,
    scale,
    depth,
    late_tokens,
    retrieval,
    premise,
)


OF_A_FINE_TUNE: tuple[Callable[[Evidence], Finding | None], ...] = (
    worth_it,
    most_changed,
)
"""Where nothing was swapped: no module to blame, and none to delete for comparison."""


def _blamed(e: Evidence) -> str:
    if e.apart is None:
        return "What was put in does harm."
    return f"It is not the work of the swap alone: {e.apart.text()} differ from the teacher's."


def _parallel(e: Evidence) -> str | None:
    """The safe alternative: keep the teacher's module and add the mechanism beside it."""
    clause = e.clauses[0]
    if clause.mechanism == "parallel" or clause.slot in ("final_norm", "rope"):
        return None
    where = (
        f"layer{clause.layer}"
        if len(e.swapped) == 1
        else f"layers[{','.join(map(str, e.swapped))}]"
    )
    slot = clause.slot
    if any(c.heads for c in e.clauses):
        if len({(c.mechanism, c.heads) for c in e.clauses}) > 1:
            return None  # no one text says where
        slot = f"heads[{named(clause.heads)}]"
    args = ", ".join(f"{name}={value}" for name, value in clause.args.items())
    call = f"{clause.mechanism}({args})" if args else clause.mechanism
    swap = f"{where}.{slot}:parallel({call}, alpha=0.1)"
    return f'mismatch trace --model {e.model} --swap "{swap}"'
