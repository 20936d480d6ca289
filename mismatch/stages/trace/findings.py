"""From the table to findings: what the numbers of one trace say, in words, with the numbers they rest on.

Each rule is a function from the evidence to at most one finding. A rule speaks only where the whole interval lies
beyond its border, and never from a value at or below the floor; without intervals all but `worth_it` and `too_little`
are silent.

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
| `too_little` | there is text for numbers, and too little for intervals: what is not judged |
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from mismatch.report import intervals
from mismatch.runs.table import GROWTH
from mismatch.spec.heads import named
from mismatch.stages.base import SEVERITIES, Finding
from mismatch.stages.lost_retrieval import lost_retrieval
from mismatch.stages.trace.evidence import Evidence, Profile

SMALL = 0.1
"""Share of the KL of `zero` up to which damage counts as low."""
LARGE = 0.3
"""Of the norm of an update (`local_error`), or of the stream it is added to (`premise`)."""
RESIZED = 0.25
"""Binary logarithm of the norm over the original's from which on an update is of another size."""


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
    worst = e.worst("rel_l2", mode="forced")
    if worst is None or not worst.lo > 0:
        return None
    layer, site = int(worst.layer), str(worst.site)
    said = _times(worst)
    numbers: dict[str, float | str] = {"layer": layer, "site": site, "rel_l2_forced": worst.value}
    numbers |= {"rel_l2_lo": worst.lo, "rel_l2_hi": worst.hi}
    if worst.lo >= 1:
        return Finding(
            "high",
            f"layer {layer}: the update misses its target by more than its own size",
            f"On the teacher's own input, {site} of layer {layer} is off by {said} times its norm; an "
            "update of zero would be off by 1.",
            numbers,
        )
    return Finding(
        "medium" if worst.lo > LARGE else "low",
        f"layer {layer}: local error {worst.value:.0%} of the update",
        f"On the teacher's own input, {site} of layer {layer} is off by {said} times its norm "
        "(0 = exact, 1 = as far as an update of zero).",
        numbers,
    )


def scale(e: Evidence) -> Finding | None:
    worst = e.worst("norm_ratio", mode="forced")
    if worst is None:
        return None
    least = max(worst.lo, -worst.hi)  # the end nearer to 0, if 0 is outside
    if not least > RESIZED:
        return None
    layer, site = int(worst.layer), str(worst.site)
    factor, lo, hi = (2.0**x for x in (worst.value, worst.lo, worst.hi))
    return Finding(
        "medium" if least > 1 else "low",
        f"layer {layer}: the update is {factor:.2f} times its size",
        f"{site} of layer {layer} has {factor:.2f} [{lo:.2f}, {hi:.2f}] times the norm of the original (geometric mean "
        "over tokens). Scale and mean are what a closed-form correction repairs first.",
        {"layer": layer, "site": site, "norm_factor": factor, "norm_lo": lo, "norm_hi": hi},
    )


def depth(e: Evidence) -> Finding | None:
    """By the paired ratio of the last block to the swapped one, on the same tokens."""
    if not e.swapped or (after := max(e.swapped)) == (last := e.n_layers - 1):
        return None
    at = {"site": "resid_post", "metric": "rel_l2"}
    first_row, last_row = e.row(layer=after, **at), e.row(layer=last, **at)
    grown = e.row(layer=last, stat=GROWTH, **at)
    if first_row is None or last_row is None or grown is None:
        return None
    if (side := intervals.side(grown.lo, grown.hi, 1.0)) == "none":
        return None
    # An interval of 1.02 to 1.06 is growth, and of no weight.
    word = {"above": "grows", "below": "heals"}.get(side) if abs(grown.value - 1) > 0.1 else "stays"
    if word is None:
        return None
    return Finding(
        "medium" if grown.lo > 2 else "info",
        f"the shift {word} behind the swap",
        f"The stream is off by {first_row.value:.3f} of its norm leaving layer {after} and by {last_row.value:.3f} "
        f"leaving layer {last} ({_times(grown)} times).",
        {
            "rel_l2_after_swap": first_row.value,
            "rel_l2_last": last_row.value,
            "growth": grown.value,
            "growth_lo": grown.lo,
            "growth_hi": grown.hi,
        },
    )


def _times(row: pd.Series) -> str:
    return f"{row.value:.2f} [{row.lo:.2f}, {row.hi:.2f}]"


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
    worst = e.worst("update_size", stat="teacher")
    if worst is None or not worst.lo > LARGE:
        return None
    layer, site = int(worst.layer), str(worst.site)
    return Finding(
        "medium",
        f"layer {layer} is not a small correction",
        f"{site} of the original has {_times(worst)} times the norm of the stream it is added to: an error here "
        "is an error of the stream.",
        {"layer": layer, "site": site, "update_size": worst.value, "lo": worst.lo, "hi": worst.hi},
    )


def too_little(e: Evidence) -> Finding | None:
    """Where `worth_it` has no control to say it of."""
    asked = {"rel_l2": "mean", "norm_ratio": "mean", "update_size": "teacher"}
    rows = [
        e.row(mode=mode, layer=layer, site=site, metric=metric, stat=stat)
        for metric, stat in asked.items()
        for mode in ("forced", "free")
        for layer in e.swapped
        for site in e.update_sites()
    ]
    found = [row for row in rows if row is not None and row.value != 0]
    if not found or any(intervals.side(row.lo, row.hi) != "none" for row in found):
        return None
    return Finding(
        "info",
        "there is too little text to judge the update",
        "Local error, size, growth behind the swap and the residual premise are in the table and not judged: "
        f"{intervals.WHY_NONE}.",
        {},
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
    too_little,
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
