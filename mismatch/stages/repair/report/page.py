"""The report of a repair: what each stage left, then where, through which branches, and what KL does not show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mismatch import registry
from mismatch.report import intervals, style
from mismatch.report.figures import ReportFigure
from mismatch.report.page import Cell, Html, grid, join, reading, tag, whole
from mismatch.report.sections import Section, replaced, verdict
from mismatch.runs.folder import Run
from mismatch.stages.probe.words import WORSE, headlines, probes_of
from mismatch.stages.repair.plan import RepairPlan, StudentReading
from mismatch.stages.repair.report.before_after_figure import before_after as before_after_figure
from mismatch.stages.repair.report.before_after_figure import before_after_data
from mismatch.stages.repair.report.curve_figure import repair_data, repair_figure, stage_table
from mismatch.stages.repair.report.gates_figure import gates_data, gates_figure
from mismatch.stages.repair.report.needles_by_branch import needle_section

CLOSED = 0.5
"""Share of the gap from which the KL counts as closed; a retrieval of which less came back is warned of."""


def repair_verdict(plan: RepairPlan, found: pd.DataFrame) -> str:
    """Share of the gap, the nats that are left of how many, and what the repair made worse.

    Args:
        plan: of the repair.
        found: from `before_after`.
    """
    swap, repaired = plan.students["swap"], plan.students["repaired"]
    text = (
        f"{percent(repaired.gap_closed)} of the gap is closed: KL to the teacher "
        f"{style.number(swap.kl[0])} → {intervals.said(*repaired.kl)} nats per token."
    )
    controls = [n for n in plan.students if n not in ("swap", "repaired")]
    beaten = [n for n in controls if plan.students[n].kl[0] <= repaired.kl[0]]
    text += f" The control {beaten[0]} costs no more." if beaten else ""
    lines = [worse_line(r) for r in worsened(found).itertuples()]
    return " ".join([text, *(f"But {line}." for line in lines)])


def percent(read: Sequence[float]) -> str:
    """`89.1 % [86.0, 91.2]`, of a share and its interval."""
    value, lo, hi = (100 * x for x in read)
    return f"{value:.1f} % {intervals.band(lo, hi, '{:.1f}'.format)}"


def stages(plan: RepairPlan) -> Html:
    """A row per stage: share and nats, with intervals, and what they cost."""
    frame = stage_table(plan)
    judged = frame["retrieval"].notna().any()
    rows = [
        (
            r.stage,
            Cell(percent((r.gap_closed, r.gap_lo, r.gap_hi)), r.gap_closed) if r.Index else "-",
            reading(r.kl, r.lo, r.hi),
            reading(r.retrieval, r.retrieval_lo, r.retrieval_hi) if judged else "not judged",
            whole(r.tokens) if r.Index else "-",
            whole(r.steps) if r.Index else "-",
            Cell(f"{r.seconds:.0f}", r.seconds) if r.Index else "-",
            "kept" if r.kept else "undone: it got worse",
        )
        for r in frame.itertuples()
    ]
    heads = (
        *("stage", f"gap closed, {intervals.named([plan.over])}", "KL left, nats per token"),
        "retrieval: NLL of answers minus the teacher's",
        *("tokens", "steps", "seconds", "kept"),
    )
    kept = [i for i, r in enumerate(frame.itertuples()) if r.kept]
    return grid(heads, rows, numbers=(1, 2, 3, 4, 5, 6), marked=kept[-1:])


def students(plan: RepairPlan) -> Html:
    """The repaired swap beside the swap and the controls, on the same tokens."""
    rows = []
    for name, found in plan.students.items():
        rows.append(
            (
                name,
                reading(*found.kl),
                reading(*found.nll),
                reading(*found.repaired_minus) if name != "repaired" else "",
                _closes(found) if name != "repaired" else "",
            )
        )
    heads = (
        *("student", "KL", "NLL minus the teacher's", "KL, repaired − student, paired"),
        "share of the student's KL that the repair closes",
    )
    marked = [i for i, name in enumerate(plan.students) if name == "repaired"]
    return grid(heads, rows, numbers=(1, 2, 3, 4), marked=marked)


def _closes(found: StudentReading) -> Cell | str:
    """Of a plan that was made before there was such a reading, nothing."""
    read = found.repaired_closes
    return "-" if math.isnan(read[0]) else Cell(percent(read), read[0])


def branches(plan: RepairPlan) -> Html:
    """The KL without each branch; a mechanism that has none is not applicable."""
    rows: list[tuple[Any, ...]] = []
    for at in plan.branches:
        if not at.branch:
            grey = tag("span", "not applicable: the mechanism has no branches", class_="faint")
            rows.append((at.where, "", "", "", grey))
            continue
        rows.append(
            (
                at.where,
                at.branch,
                reading(at.kl, at.lo, at.hi),
                reading(at.more, at.more_lo, at.more_hi),
                VERDICTS.get(at.verdict, at.verdict),
            )
        )
    words = (
        "Each branch of the repaired mechanism taken out in turn. A branch without which the KL hardly grows is not "
        "used: the rest was trained around it."
    )
    heads = (
        "layer and slot",
        "branch taken out",
        "KL without it",
        "minus the KL with it, paired",
        "so",
    )
    return join([tag("p", words), grid(heads, rows, numbers=(2, 3))])


VERDICTS = {
    "used": "used",
    "bypassed": "repaired by bypass: not used",
    "open": "open: too little text to tell",
}


def before_after(table: pd.DataFrame, dictionary: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """The headline of every probe for teacher, swap and repaired model.

    Returns:
        Rows metric, stat, unit, teacher, swap, repaired, left (repaired minus teacher), left_lo, left_hi, back (the
        share of what the swap lost that was recovered; NaN where the interval of that loss holds 0, and where it is a
        gain).
    """
    of = probes_of(table)
    mine = table[table["metric"].isin(of) & ~table["stat"].str.contains("[kept=", regex=False)]
    teacher = mine["student"] == "teacher"
    parts = {}
    for stage in ("surgery", "repair"):
        some = mine[teacher | ((mine["student"] == "swap") & (mine["stage"] == stage))]
        parts[stage] = headlines(some, dictionary)
    if any(part.empty for part in parts.values()):
        return pd.DataFrame(columns=list(BEFORE_AFTER))
    keys = ["metric", "stat", "layer", "head", "site"]
    joined = parts["surgery"].merge(parts["repair"], on=keys, suffixes=("", "_after"))
    rows = []
    for r in joined.itertuples():
        found_less = lost(r.metric, r.difference_lo, r.difference_hi)
        back = 1 - r.difference_after / r.difference if found_less else math.nan
        numbers = (r.teacher, r.value, r.value_after)
        left = (r.difference_after, r.difference_lo_after, r.difference_hi_after)
        rows.append((r.metric, r.stat, r.unit, *numbers, *left, back))
    return pd.DataFrame(rows, columns=list(BEFORE_AFTER))


def lost(metric: str, lo: float, hi: float) -> bool:
    """Whether the interval of swap minus teacher is a loss: a key that is found better than by the teacher is none."""
    worse = WORSE.get(metric, 0)  # 0: a difference in either direction is a loss
    return (lo > 0 and worse >= 0) or (hi < 0 and worse <= 0)


BEFORE_AFTER = (
    *("metric", "stat", "unit", "teacher", "swap", "repaired"),
    *("left", "left_lo", "left_hi", "back"),
)


def probe_lines(
    table: pd.DataFrame, plan: RepairPlan, dictionary: Mapping[str, Any] | None = None
) -> list[str]:
    """`passkey logprob -0.07 -> -9.6 -> -5.1 nats per key`, and a warning where KL is closed and retrieval is not."""
    found = before_after(table, dictionary)
    lines = []
    for r in found.itertuples():
        numbers = " -> ".join(style.number(x) for x in (r.teacher, r.swap, r.repaired))
        lines.append(
            f"{r.metric + ' ' + r.stat:22}  {numbers} {r.unit}   repaired - teacher "
            f"{style.interval(r.left, r.left_lo, r.left_hi)}"
        )
    if lines:
        lines.insert(0, "teacher -> swap -> repaired")
    return lines + [f"warning: {text}" for text in warnings(found, plan)]


def worsened(found: pd.DataFrame) -> pd.DataFrame:
    """The rows of `before_after` in which the repaired model is worse than the swap was: what it lacks of the teacher
    is more than the swap lacked, beyond its interval. Of each probe the reading that fell most."""
    cards = registry.probes()
    sign = found["metric"].map(
        lambda name: {"higher": -1, "lower": 1}.get(cards.card(name).facts["better"], 0)
    )
    fell = sign * (found["repaired"] - found["swap"])
    bound = found["left_lo"].where(
        sign > 0, -found["left_hi"]
    )  # of what is still lacking, in the worse direction
    worse = found[(fell > 0) & (bound > sign * (found["swap"] - found["teacher"]))]
    return worse.loc[fell[worse.index].groupby(worse["metric"], sort=False).idxmax()]


def worse_line(row: Any) -> str:
    """`the repair made generation agreed worse: 48 -> 42.6 -> 24.5 tokens (teacher, swap, repaired)`."""
    numbers = " -> ".join(style.number(x) for x in (row.teacher, row.swap, row.repaired))
    return f"the repair made {row.metric} {row.stat} worse: {numbers} {row.unit} (teacher, swap, repaired)"


def warnings(found: pd.DataFrame, plan: RepairPlan) -> list[str]:
    """What the repair made worse; and where the KL says repaired and retrieval does not: of each probe the reading that
    is furthest off."""
    worse = worsened(found)
    return [worse_line(r) for r in worse.itertuples()] + _missing(
        found[~found["metric"].isin(worse["metric"])], plan
    )


def _missing(found: pd.DataFrame, plan: RepairPlan) -> list[str]:
    closed = plan.students["repaired"].gap_closed[0]
    if not closed >= CLOSED or found.empty:
        return []
    sure = (found["left_lo"] > 0) | (found["left_hi"] < 0)
    missing = found[found["metric"].isin(list(WORSE)) & (found["back"] < CLOSED) & sure]
    worst = missing.loc[missing["left"].abs().groupby(missing["metric"], sort=False).idxmax()]
    return [
        f"{100 * closed:.0f} % of the KL gap is closed, and {100 * max(0.0, r.back):.0f} % of what {r.metric} {r.stat} "
        f"lost is recovered ({style.number(r.teacher)} -> {style.number(r.swap)} -> {style.number(r.repaired)}): text "
        "does not ask for what is still missing"
        for r in worst.itertuples()
    ]


def asked(run: Run) -> Html:
    """The probes as a table, with the warning."""
    found = before_after(run.table, run.dictionary)
    if found.empty:
        return tag("p", "No probe was asked.")
    rows = [
        (
            f"{r.metric} {r.stat}",
            r.unit,
            *(reading(x) for x in (r.teacher, r.swap, r.repaired)),
            reading(r.left, r.left_lo, r.left_hi),
            "nothing was lost" if math.isnan(r.back) else Cell(f"{100 * r.back:.0f} %", r.back),
        )
        for r in found.itertuples()
    ]
    heads = (
        *("probe", "unit", "teacher", "swap", "repaired"),
        *("repaired − teacher, 95 % interval", "recovered"),
    )
    warned = [tag("p", text, class_="warning") for text in warnings(found, run.plan)]
    return join([*warned, grid(heads, rows, numbers=(2, 3, 4, 5, 6))])


FIGURES = (
    ReportFigure(
        "repair",
        "The repair curve",
        repair_figure,
        repair_data,
        "Each point is the student after a stage, on text that neither trained nor selected it. Lower is "
        "nearer to the teacher. Dashed: controls, which the repaired swap must be below to have earned its place. "
        "Hollow: a stage that made it worse and was undone.",
    ),
    ReportFigure(
        "before_after",
        "The shift before and after",
        before_after_figure,
        before_after_data,
        "Pairs of panels on one scale: what is paler below than above was repaired. Read the stream (resid_post) from "
        "the swap to the right: what stays dark at its end is what the prediction still lacks. An update (attn_out, "
        "mlp_out) that is darker after the repair is one that was trained to make up for another.",
    ),
    ReportFigure(
        "gates",
        "Where the gates went",
        gates_figure,
        gates_data,
        "A gate at its dotted line was not moved by the repair: its learning rate was too small, or the swap does not "
        "need it. All heads at 0 or at 1: one branch was given up, and the table of branches shows whether it matters.",
    ),
)


def figures(run: Run) -> tuple[ReportFigure, ...]:
    """The curve, the shift before and after, the gates."""
    return FIGURES


def sections(run: Run) -> list[Section]:
    """The verdict and the stages first, then where, through which branches, and what KL does not show."""
    plan: RepairPlan = run.plan
    curve, shift, gates = FIGURES
    found = before_after(run.table, run.dictionary)
    warned = warnings(found, plan)
    return [
        verdict(repair_verdict(plan, found)),
        Section("", (*(tag("p", text, class_="warning") for text in warned), stages(plan), curve)),
        Section("Beside the controls", (students(plan),)),
        Section("Before and after", (shift, gates)),
        Section("Are the branches used?", (branches(plan), needle_section(run.table))),
        Section("Retrieval and free generation", (asked(run),)),
        Section("Notes of the stages", (_notes(plan),)),
        replaced(run),
    ]


def _notes(plan: RepairPlan) -> Html:
    said = dict.fromkeys([*(n for stage in plan.stages for n in stage.notes), *plan.notes])
    return tag("ul", *(tag("li", line) for line in said)) if said else tag("p", "Nothing.")
