"""One layer after another: after each, every other layer is scanned anew with those already in.

It sees what adding up does not: a layer that was cheap alone and is dear beside another. It costs a scan a layer, and
it never takes one back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mismatch.errors import UsageError
from mismatch.metrics.sums.readings import Reading
from mismatch.runs.plan import SwapPlan
from mismatch.runs.ranks import ALONE, Ranks
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.plan.numbers import Numbers
from mismatch.stages.scan.batches import measure
from mismatch.stages.scan.cells import Cell
from mismatch.stages.scan.sums import Sums
from mismatch.stages.scan.sweep import Sweep
from mismatch.stages.scan.tasks import Task
from mismatch.surgery.operate import replace


@dataclass(frozen=True)
class Step:
    """A layer that was taken, and what all layers so far cost together on the text that chose them.

    `price` is what it was taken for; `again` the share of draws (`mismatch.stages.scan.unit_sums`) that take the same
    one, None where there are too few documents or prompts, or all cost the same.
    """

    cell: Cell
    kl: Reading
    lost: float
    price: float
    again: float | None = None


def greedy(
    sweep: Sweep,
    cells: Sequence[Cell],
    tasks: Sequence[Task],
    config: PlanConfig,
    able: Sequence[str] = (),
    progress: Callable[[int], None] = lambda runs: None,
    ranks: Ranks = ALONE,
) -> tuple[Step, ...]:
    """Take the cheapest layer again and again, as many as were asked for or as the budgets allow.

    Args:
        sweep: with an empty tree; afterwards it holds the choice.
        cells: candidates, lowest layer first.
        tasks: text, the passkey where retrieval is to be kept, those of answers where the score is of them.
        config: score, number of layers, and budgets, which are for what the layers cost together.
        able: tasks of answers that the model can do.
        progress: told how many runs of a cell were done.
        ranks: who we are among how many: they share the candidates, and all take the same ones.

    Raises:
        UsageError: the budgets end it before the number that was asked for.
    """
    steps: list[Step] = []
    left = list(cells)
    size = config.batch_size * config.seq_len
    by_name = {task.name: task for task in tasks}
    while left and (config.layers is None or len(steps) < config.layers):
        sums = measure(sweep, left, tasks, batch_tokens=size, ranks=ranks, progress=progress)
        numbers = _numbers(sums, left, [task for task in able if task in by_name])
        prices = dict(zip(numbers.cells, numbers.costs().prices(config.score), strict=True))
        found = []
        for cell in left:
            kl = sums.damage(cell, by_name["text"])
            key = by_name.get("passkey")
            lost = 0.0 if key is None else sums.damage(cell, key).value
            if cell.key in prices and _fits(config, kl.value, lost):
                found.append(Step(cell, kl, lost, float(prices[cell.key])))
        if not found:
            break
        best = min(found, key=lambda step: step.price)
        steps.append(dataclasses.replace(best, again=_again(config, numbers, found, best)))
        plan = sweep.base.plan
        added = replace(
            sweep.base, best.cell.placements, seed=sweep.seed, calibrations=sweep.calibrations
        )
        sweep.base.plan = SwapPlan(spec="", clauses=(*plan.clauses, *added))
        left = [cell for cell in left if cell.layer != best.cell.layer]
    if not steps or (config.layers is not None and len(steps) < config.layers):
        raise UsageError(
            f"greedy ends after {len(steps)} layers: every further one breaks the budgets, or there is none",
            hint="raise the budget, widen --among, or ask for fewer --layers",
        )
    return tuple(steps)


def _numbers(sums: Sums, cells: Sequence[Cell], able: Sequence[str]) -> Numbers:
    """What the finite ones of some cells cost."""
    units = {task: found for task, found in sums.units().items() if task == "text" or task in able}
    places = {
        cell.key: (cell.name, cell.layer)
        for cell in cells
        if cell.layer is not None and all(cell.key in found.sums for found in units.values())
    }
    return Numbers(places, units, tuple(able))


def _again(config: PlanConfig, numbers: Numbers, found: Sequence[Step], best: Step) -> float | None:
    """The share of draws in which the best of those that fit is the best again; None: too few documents or prompts, or
    all cost the same."""
    alike = len(found) > 1 and len({step.price for step in found}) == 1
    if alike or numbers.over(config.score) is None:
        return None
    keys = [*numbers.cells]
    fit = [keys.index(step.cell.key) for step in found]
    firsts = numbers.drawn(config.seed).prices(config.score)[:, fit].argmin(1)
    return float((firsts == found.index(best)).mean())


def _fits(config: PlanConfig, kl: float, lost: float) -> bool:
    """Whether a choice is within the budgets. What is not finite never is."""
    if not kl < float("inf"):
        return False
    if config.budget_kl is not None and kl > config.budget_kl:
        return False
    return not config.keep_retrieval or lost <= config.budget_retrieval
