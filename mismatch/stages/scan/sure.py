"""How sure the rankings of a scan are, in words and as a table: ranks of layers (or heads), and whether tasks agree.

What is looked at as a set is the cheapest quarter: what a plan of few layers would take. No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mismatch.report.page import Html, grid, join, tag
from mismatch.report.style import number
from mismatch.stages.scan.plan import ScanPlan
from mismatch.stages.scan.reliability import (
    Overlap,
    Reliability,
    cheapest,
    overlaps,
    reliability,
)

QUARTER = 4
"""The set: one place in so many."""
LEAST = 4
"""Places that a ranking needs."""
SEED = 0
"""Of the draws: the same words for the same scan."""


def places(plan: ScanPlan, task: str, name: str) -> list[str]:
    """Layers (`18`) or heads (`18.2`) of a mechanism that a task was asked of."""
    found = plan.units.get(task)
    keys = (key.rpartition("@") for key in ([] if found is None else found.sums))
    return [where for who, _, where in keys if who == name]


def ranking(plan: ScanPlan, task: str, name: str) -> Reliability | None:
    """How sure the ranks of one mechanism's places are; a place is its number in `places`. None: too few places,
    documents or prompts, or no place differs from another."""
    there = places(plan, task, name)
    if len(there) < LEAST or not plan.units[task].enough or not _differ(plan, task, name, there):
        return None
    units, keys = plan.units[task], [f"{name}@{where}" for where in there]
    prices, drawn = units.means(keys), units.drawn(keys, SEED)
    numbers, count = range(len(keys)), len(keys) // QUARTER
    again = [cheapest(numbers, row, count) for row in drawn]
    return reliability(numbers, prices, drawn, cheapest(numbers, prices, count), again, units.over)


def _differ(plan: ScanPlan, task: str, name: str, there: Sequence[str]) -> bool:
    return len(set(plan.units[task].means([f"{name}@{where}" for where in there]).tolist())) > 1


def sure_lines(plan: ScanPlan, task: str, name: str, shown: Sequence[str], unit: str) -> list[str]:
    """Ranks of the places that are shown, and how sure the cheapest quarter is."""
    sure = ranking(plan, task, name)
    if sure is None:
        return []
    there = places(plan, task, name)
    ranks = {there[one.place]: f"{one.rank} [{one.lo}, {one.hi}]" for one in sure.ranks}
    words = "   ".join(f"{where}: {ranks[where]}" for where in shown if where in ranks)
    count = len(there) // QUARTER
    return [
        f"    ranks         {words}   (1 is the cheapest; {sure.over} drawn again {sure.draws} times)",
        f"    cheapest {count}: the same {unit}s in {sure.same:.0%} of the draws, "
        f"{number(sure.kept)} of {count} kept on average",
    ]


def agreement(plan: ScanPlan, tasks: Collection[str], name: str) -> list[tuple[str, str, Overlap]]:
    """What the cheapest quarters of a mechanism on every two tasks share."""
    every = [places(plan, task, name) for task in tasks]
    there = [where for where in (every[0] if every else []) if all(where in one for one in every)]
    if len(there) < LEAST:
        return []
    tasks = [task for task in tasks if _differ(plan, task, name, there)]
    keys, numbers = [f"{name}@{where}" for where in there], range(len(there))
    count = len(there) // QUARTER
    sets: dict[str, Collection[int]] = {
        task: cheapest(numbers, plan.units[task].means(keys), count) for task in tasks
    }
    return overlaps(sets, len(there))


def agreement_lines(
    plan: ScanPlan, tasks: Collection[str], names: Sequence[str], unit: str
) -> list[str]:
    """Whether tasks name the same places, beside chance."""
    lines = []
    for name in names:
        if found := agreement(plan, tasks, name):
            lines.append(f"  {name}")
            lines += [f"    {one} and {other} {shared.text()}" for one, other, shared in found]
    return [f"The cheapest quarter of {unit}s, one task beside another", *lines] if lines else []


def how_sure(plan: ScanPlan, tasks: Collection[str], names: Sequence[str], unit: str) -> Html:
    """The rank of every place with its interval, a column for each task and mechanism; and whether tasks agree."""
    columns = {
        f"{name}, {task}": {
            places(plan, task, name)[one.place]: f"{one.rank} [{one.lo}, {one.hi}]"
            for one in sure.ranks
        }
        for name in names
        for task in tasks
        if (sure := ranking(plan, task, name)) is not None
    }
    if not columns:
        return tag(
            "p", f"No ranks: that takes {LEAST} {unit}s, and documents or prompts to draw from."
        )
    rows = dict.fromkeys(where for column in columns.values() for where in column)
    words = (
        f"Rank of each {unit}, 1 is the cheapest, with the ranks that hold 95 % of the draws of other documents and "
        "prompts. Below: what the cheapest quarters by two tasks share, beside what two sets at random share."
    )
    shared = [
        (name, f"{one} and {other}", found.shared, min(found.sizes), f"{found.chance:.1f}", f"{found.p:.3f}")
        for name in names
        for one, other, found in agreement(plan, tasks, name)
    ]  # fmt: skip
    heads = ("mechanism", "tasks", "shared", "of", "by chance", "p of as many by chance")
    return join(
        [
            tag("p", words),
            grid(
                (unit, *columns),
                [(where, *(column.get(where, "-") for column in columns.values())) for where in rows],
                numbers=range(len(columns) + 1),
            ),
            *([grid(heads, shared, numbers=(2, 3, 4, 5))] if shared else []),
        ]
    )  # fmt: skip
