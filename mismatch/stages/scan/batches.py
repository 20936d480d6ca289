"""All batches of all tasks, cell by cell, in an order that can stop anywhere and go on.

Order: tasks, batches, cells. The state (every sum, and which cell of which batch comes next) is saved every few seconds
between cells, so a scan that was killed goes on with the next cell; the teacher's pass over the batch in flight is all
that runs twice. A cell's sums are added in one order, whoever adds them, so the bytes of the table do not depend on
where it stopped, nor on how many ranks shared the cells.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from mismatch.errors import LayoutError
from mismatch.forward import hooks
from mismatch.forward.hooks import on_device
from mismatch.forward.verify import TOKENS, prove_student
from mismatch.metrics.sums.logits import LogitPair
from mismatch.runs.ranks import ALONE, Ranks
from mismatch.runs.state import State
from mismatch.runs.stopping import polite
from mismatch.stages.scan.cells import Cell
from mismatch.stages.scan.sums import Sums
from mismatch.stages.scan.sweep import Sweep
from mismatch.stages.scan.tasks import Task
from mismatch.surgery.operate import holding

SAVE_EVERY = 20.0
"""Seconds between two saves of the state."""


def measure(
    sweep: Sweep,
    cells: Sequence[Cell],
    tasks: Sequence[Task],
    *,
    batch_tokens: int,
    ranks: Ranks = ALONE,
    state: State | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda runs: None,
) -> Sums:
    """Ask every cell every task; on several ranks, each its share of the cells.

    Args:
        sweep: teacher, tree and calibrations.
        cells: lowest first block first.
        tasks: what is asked.
        batch_tokens: tokens that run together.
        ranks: who we are among how many.
        state: where to save, and what to go on from; None saves nothing.
        fingerprint: of all that must be equal when a scan goes on.
        progress: told how many runs (a cell on a batch) were done since it was last told.

    Returns:
        The sums of all cells, on every rank.

    Raises:
        KeyboardInterrupt: after the cells in flight were finished and the state saved.
        NumericsError: the teacher is not finite.
        NoRoom: another rank is out of memory.
    """
    mine = [cell for index, cell in enumerate(cells) if ranks.mine(index)]
    sums = Sums(mine, tasks)
    where = _resume(sums, batch_tokens, state, fingerprint)
    with polite() as stopping:
        saved = time.monotonic()

        def due() -> bool:
            return stopping() or time.monotonic() - saved > SAVE_EVERY

        for at, task in enumerate(tasks):
            for number, batch in enumerate(task.batches(batch_tokens)):
                begin = _done(where, (at, number), len(mine))
                progress(begin)
                if begin == len(mine):
                    continue
                ids, asked, docs = (on_device(sweep.teacher, part) for part in batch)

                def finished(count: int, begin: int = begin, run: tuple = (at, number)) -> None:
                    nonlocal saved
                    next_ = [*run, begin + count]
                    if due():
                        if state is not None:
                            here = {"next": next_, "batch": batch_tokens}
                            state.save(sums.state(), here, fingerprint or {})
                        saved = time.monotonic()
                    if stopping():
                        raise KeyboardInterrupt

                sweep.run(
                    mine[begin:], ids, asked, docs,
                    partial(_update, sums, task),
                    broken=partial(_broken, sums, task),
                    ran=lambda: progress(1),
                    due=due,
                    done=finished,
                )  # fmt: skip
        if state is not None and ranks.world > 1:
            # While this rank waits for the others, one of them may fail and end all.
            here = {"next": [len(tasks), 0, 0], "batch": batch_tokens}
            state.save(sums.state(), here, fingerprint or {})
    if ranks.world == 1:
        return sums
    whole = Sums(cells, tasks)
    for part in ranks.everywhere(sums.state()):
        whole.load(part)
    return whole


def prove(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Prove on a few tokens that the prefix may be shared: of each column, in its last layer.

    Raises:
        LayoutError: a site in front of a swap differs from the teacher's.
    """
    last = {cell.name: cell for cell in cells}
    for cell in last.values():
        with holding(sweep.base, cell.placements, seed=sweep.seed, calibrations=sweep.calibrations):
            prove_student(sweep.teacher, sweep.base.layout, cell.first)


@torch.no_grad()
def prove_restored(sweep: Sweep) -> None:
    """Prove on a few tokens that the tree is the teacher again, after everything was taken out.

    Raises:
        LayoutError: a mechanism changed the model around it, so the cells behind it are wrong.
    """
    layout = sweep.teacher
    ids = torch.arange(TOKENS, device=layout.embedding_device)[None] % layout.vocab
    ours, theirs = (hooks.run(each, ids) for each in (layout, sweep.base.layout))
    if not torch.equal(ours, theirs):
        raise LayoutError(
            "a mechanism of this scan left the model changed: the tree it was taken out of differs "
            f"from the teacher by {(ours - theirs).abs().max():.3g}",
            hint="scan the mechanisms one at a time to find it",
        )


def _resume(
    sums: Sums, batch_tokens: int, state: State | None, fingerprint: Mapping[str, Any] | None
) -> list[int]:
    """Fill the sums from the last save; the task, batch and cell to go on with. A save of larger batches, which did not
    fit, counts for nothing."""
    found = None if state is None else state.load(fingerprint or {})
    if found is None or found[1].get("batch") != batch_tokens:
        return [0, 0, 0]
    arrays, info = found
    sums.load(arrays)
    return info["next"]


def _done(where: Sequence[int], here: tuple[int, int], cells: int) -> int:
    """How many cells of a batch an earlier run finished."""
    if tuple(where[:2]) > here:
        return cells
    return where[2] if tuple(where[:2]) == here else 0


def _update(sums: Sums, task: Task, cell: Cell, pair: LogitPair) -> None:
    sums.update(cell, task, pair)


def _broken(sums: Sums, task: Task, cell: Cell) -> None:
    sums.broken.add((cell.key, task.name))
