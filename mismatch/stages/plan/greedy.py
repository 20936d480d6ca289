"""One layer after another: after each, every other layer is scanned anew with those already in.

It sees what adding up does not: a layer that was cheap alone and is dear beside another. It costs a scan a layer, and
it never takes one back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mismatch.errors import UsageError
from mismatch.metrics.sums.readings import Reading
from mismatch.runs.plan import SwapPlan
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.scan.batches import measure
from mismatch.stages.scan.cells import Cell
from mismatch.stages.scan.sweep import Sweep
from mismatch.stages.scan.tasks import Task
from mismatch.surgery.operate import replace


@dataclass(frozen=True)
class Step:
    """A layer that was taken, and what all layers so far cost together on the text that chose them."""

    cell: Cell
    kl: Reading
    lost: float


def greedy(
    sweep: Sweep,
    cells: Sequence[Cell],
    tasks: Sequence[Task],
    config: PlanConfig,
    progress: Callable[[int], None] = lambda runs: None,
) -> tuple[Step, ...]:
    """Take the cheapest layer again and again, as many as were asked for or as the budgets allow.

    Args:
        sweep: with an empty tree; afterwards it holds the choice.
        cells: candidates, lowest layer first.
        tasks: text, and the passkey where retrieval is to be kept.
        config: number of layers and budgets; they are for what the layers cost together.
        progress: told how many runs of a cell were done.

    Raises:
        UsageError: the budgets end it before the number that was asked for.
    """
    steps: list[Step] = []
    left = list(cells)
    size = config.batch_size * config.seq_len
    by_name = {task.name: task for task in tasks}
    while left and (config.layers is None or len(steps) < config.layers):
        sums = measure(sweep, left, tasks, batch_tokens=size, progress=progress)
        found = []
        for cell in left:
            kl = sums.damage(cell, by_name["text"])
            key = by_name.get("passkey")
            lost = 0.0 if key is None else sums.damage(cell, key).value
            if _fits(config, kl.value, lost):
                found.append(Step(cell, kl, lost))
        if not found:
            break
        best = min(found, key=lambda step: step.kl.value)
        steps.append(best)
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


def _fits(config: PlanConfig, kl: float, lost: float) -> bool:
    """Whether a choice is within the budgets. What is not finite never is."""
    if not kl < float("inf"):
        return False
    if config.budget_kl is not None and kl > config.budget_kl:
        return False
    return not config.keep_retrieval or lost <= config.budget_retrieval
