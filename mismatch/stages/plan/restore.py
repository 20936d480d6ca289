"""Give one layer back: all layers are replaced, and each in turn is the teacher's again.

What a layer regains says what it is worth beside the others being gone, where a scan says what it is worth beside the
others being there. Blocks in front of the layer are the replaced ones in every student, so they run once: a pass costs
as much as a scan. Nothing is repaired in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mismatch.errors import NumericsError, UsageError
from mismatch.runs.plan import SwapPlan
from mismatch.runs.ranks import ALONE, Ranks
from mismatch.runs.table import SWAP
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.scan.batches import measure, prove
from mismatch.stages.scan.cells import Cell
from mismatch.stages.scan.sweep import Sweep
from mismatch.stages.scan.tasks import Task
from mismatch.stages.scan.unit_sums import UnitSums
from mismatch.surgery.operate import replace


def restored(
    sweep: Sweep,
    cells: Sequence[Cell],
    task: Task,
    config: PlanConfig,
    progress: Callable[[int], None] = lambda runs: None,
    ranks: Ranks = ALONE,
) -> UnitSums:
    """What each layer regains, by the key of its cell.

    Args:
        sweep: with an empty tree; afterwards all cells are in it.
        cells: one mechanism, each layer that may be replaced, lowest first.
        task: text.
        config: the settings.
        progress: told how many runs of a cell were done.
        ranks: who we are among how many: they share the layers.
    """
    placements = tuple(p for cell in cells for p in cell.placements)
    prove(sweep, (Cell(SWAP, None, placements, cells[0].first),))
    added = replace(sweep.base, placements, seed=sweep.seed, calibrations=sweep.calibrations)
    sweep.base.plan = SwapPlan(spec="", clauses=added)
    every = Cell(SWAP, None, (), cells[0].first)
    back = [Cell(cell.name, cell.layer, (), cell.first) for cell in cells]
    size = config.batch_size * config.seq_len
    given = [every, *back]
    sums = measure(sweep, given, (task,), batch_tokens=size, ranks=ranks, progress=progress)
    whole = sums.part(every, task, "kl").per_document("kl")
    if any((cell.key, task.name) in sums.broken for cell in (every, *back)):
        raise NumericsError(
            f"with all {len(cells)} layers replaced activations are not finite: nothing can be given back",
            hint="narrow --among, or take --score kl",
        )
    return UnitSums.of(
        {cell.key: whole - sums.part(cell, task, "kl").per_document("kl") for cell in back}
    )


def check_better(units: UnitSums) -> None:
    """Refuse what was regained where giving layers back does more harm than good: the replaced model is then so far
    from the teacher that one layer more of the teacher's tells nothing.

    Raises:
        UsageError: what layers lost is more than what others regained.
    """
    regained = [sum(row) / sum(units.counts) for row in units.sums.values()]
    better, worse = (sum(x for x in regained if sign * x > 0) for sign in (1, -1))
    if -worse > better:
        count = sum(x < 0 for x in regained)
        raise UsageError(
            f"with all {len(regained)} layers replaced, giving one back made text worse for {count} of them, by "
            f"{-worse:.2f} nats a token in all, and better for the others by {better:.2f}: the replaced model is too "
            "far from the teacher to say what a layer is worth",
            hint="narrow --among, or take --score answer_nll or kl",
        )
