"""One batch of a scan: the teacher once, then each cell from its first swapped block on.

```
teacher   block 0 .. block L-1  final   head          once for all cells
cell k                  block k .. block L-1  final   head          from the stored stream entering k
```
All cells share one module tree: what a cell replaces is put in, run, and taken out again, so that a hundred students
hold no more memory than one. Streams in front of the lowest block that is still to run are let go. Final states are
kept of the scored predictions only; the head and the comparison take them in chunks, the teacher's chunk once for as
many cells as fit into memory.

A base other than the teacher (`base` with parts replaced) gives the streams instead: each cell then is the base with
one part more, which is what greedy planning asks; or, of a cell that places nothing, with one layer given back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mismatch.forward.head import Predictions, compare
from mismatch.forward.shared_prefix import (
    Stored,
    check_finite,
    is_finite,
    run_prefix,
    run_suffix,
)
from mismatch.metrics.sums.logits import LogitPair
from mismatch.models.layout import Layout
from mismatch.stages.scan.cells import Cell
from mismatch.surgery.operate import Calibrations, Student, given_back, holding

HELD = 1 << 28
"""Bytes of final states that wait for the head together."""


@dataclass
class Work:
    """What was run: blocks over tokens, and the head over predictions, teacher and cells."""

    blocks: int = 0
    head: int = 0

    def as_dict(self) -> dict[str, int]:
        return {"block_tokens": self.blocks, "head_tokens": self.head}


@dataclass
class Sweep:
    """Runs cells over batches.

    Args:
        teacher: the untouched model.
        base: the tree that cells are put into; with nothing replaced it is the teacher.
        seed: of every new tensor.
        calibrations: filled calibrators of the cells that want one.
    """

    teacher: Layout
    base: Student
    seed: int = 0
    calibrations: Calibrations = field(default_factory=dict)
    work: Work = field(default_factory=Work)

    @torch.no_grad()
    def run(
        self,
        cells: Sequence[Cell],
        ids: Tensor,
        asked: Tensor,
        docs: Tensor,
        met: Callable[[Cell, LogitPair], None],
        *,
        broken: Callable[[Cell], None],
        ran: Callable[[], None] = lambda: None,
        due: Callable[[], bool] = lambda: False,
        done: Callable[[int], None] = lambda cells: None,
    ) -> None:
        """One batch.

        Args:
            cells: lowest first block first.
            ids: int64 `batch pos`.
            asked: bool `batch pos`: the prediction made at this position is compared.
            docs: int64 `batch`.
            met: told of each cell beside the teacher, a chunk of predictions at a time.
            broken: told of a cell whose final states are not finite; it is compared with nothing.
            ran: told whenever a cell's blocks were run.
            due: asked then whether those that wait for the head should be finished now.
            done: told how many of `cells` are finished, whenever some are.

        Raises:
            NumericsError: the teacher itself is not finite.
            RunError: a cell changed a stored stream in place, so that the next one would start from something else.
        """
        final, streams = self._streams(ids, {cell.first for cell in cells})
        rows = asked.flatten().nonzero().squeeze(1)
        reference = final.flatten(0, 1)[rows.to(final.device)]
        del final
        predictions = Predictions.of(ids, docs, rows)
        size = max(1, HELD // max(1, reference.numel() * reference.element_size()))
        held: list[tuple[Cell, Layout, Tensor]] = []
        layout = self.base.layout
        for index, cell in enumerate(cells):
            for first in [first for first in streams if first < cell.first]:
                del streams[first]
            with self._standing(cell):
                who = f"`{cell.name}` at {cell.where}"
                state = run_suffix(layout, ids, cell.first, streams, who)
            self.work.blocks += (layout.n_layers - cell.first) * ids.numel()
            ran()
            if is_finite(state):
                held.append((cell, layout, state.flatten(0, 1)[rows.to(state.device)]))
            else:
                broken(cell)
            if len(held) == size or index == len(cells) - 1 or due():
                for compared, pair in compare(self.teacher, reference, held, predictions):
                    met(compared, pair)
                self.work.head += len(reference) * (1 + len(held)) if held else 0
                held.clear()
                done(index + 1)

    def _standing(self, cell: Cell) -> AbstractContextManager[object]:
        """The base as the cell has it."""
        if not cell.placements:
            return given_back(self.base, cell.layer)
        return holding(self.base, cell.placements, seed=self.seed, calibrations=self.calibrations)

    def _streams(self, ids: Tensor, starts: set[int]) -> tuple[Tensor, Stored[int]]:
        """The teacher's final states, and the stream entering each block of `starts`: the base's own."""
        n_layers, swapped = self.teacher.n_layers, self.base.plan.first
        last = n_layers if swapped is None else swapped
        own = {start for start in starts if start > last}
        final, streams = run_prefix(self.teacher, ids, starts - own | ({last} if own else set()))
        self.work.blocks += n_layers * ids.numel()
        check_finite(final, "teacher", "final states")
        if own:
            run_prefix(self.base.layout, ids, own, begin=last, streams=streams)
            self.work.blocks += (n_layers - last) * ids.numel()
        return final, streams
