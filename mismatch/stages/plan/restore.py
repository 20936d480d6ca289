"""Give one layer back: all layers are replaced, and each in turn is the teacher's again.

What a layer regains says what it is worth beside the others being gone, where a scan says what it is worth beside the
others being there. Blocks in front of the layer are the replaced ones in every student, so they run once: a pass costs
as much as a scan. Nothing is repaired in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mismatch.errors import NumericsError
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
