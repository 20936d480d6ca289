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
one part more. That is what greedy planning asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mismatch.errors import NumericsError, RunError
from mismatch.forward import hooks
from mismatch.forward.head import CHUNK, log_probs
from mismatch.forward.sites import Tap, taps
from mismatch.metrics.sums.logits import LogitPair
from mismatch.models.layout import Layout
from mismatch.stages.scan.cells import Cell
from mismatch.surgery.operate import Calibrations, Student, holding

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
        final, streams = self._streams(ids, {cell.first for cell in cells} - {0})
        rows = asked.flatten().nonzero().squeeze(1).to(final.device)
        reference = final.flatten(0, 1)[rows]
        del final
        facts = _facts(ids, docs, rows)
        size = max(1, HELD // max(1, reference.numel() * reference.element_size()))
        held: list[tuple[Cell, Tensor]] = []
        versions = {first: stream._version for first, stream in streams.items()}
        for index, cell in enumerate(cells):
            for first in [first for first in streams if first < cell.first]:
                del streams[first]
            stream = streams.get(cell.first)
            with holding(
                self.base, cell.placements, seed=self.seed, calibrations=self.calibrations
            ):
                state = self._final(self.base.layout, ids, (), _nothing, cell.first, stream)
            if stream is not None and stream._version != versions[cell.first]:
                raise RunError(
                    f"`{cell.name}` at layer {cell.layer} changed the stream that it was given in place"
                )
            ran()
            if torch.isfinite(state).all():
                held.append((cell, state.flatten(0, 1)[rows]))
            else:
                broken(cell)
            if len(held) == size or index == len(cells) - 1 or due():
                self._compare(reference, held, facts, met)
                held.clear()
                done(index + 1)

    def _streams(self, ids: Tensor, starts: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """The teacher's final states, and the stream entering each block of `starts`: the base's own."""
        swapped = self.base.plan.first
        last = self.teacher.n_layers if swapped is None else swapped
        kept: dict[int, Tensor] = {}

        def keep(tap: Tap, value: Tensor) -> None:
            kept[tap.layer + 1] = value

        shared = {start for start in starts if start <= last}
        if swapped:
            shared.add(swapped)
        wanted = [taps(self.teacher, start - 1)[-1] for start in sorted(shared)]
        final = self._final(self.teacher, ids, wanted, keep, 0, None)
        if not torch.isfinite(final).all():
            raise NumericsError(
                "NaN or infinity in the teacher's final states",
                hint="the untouched model itself is not finite here: try --dtype float32",
            )
        own = sorted(starts - shared)
        if own:
            layout = self.base.layout
            wanted = [Tap(start - 1, "resid_post", "", "out") for start in own]
            self._final(layout, ids, wanted, keep, last, kept.get(last))
        return final, {start: kept[start] for start in starts}

    def _final(
        self,
        layout: Layout,
        ids: Tensor,
        wanted: Sequence[Tap],
        visit: Callable[[Tap, Tensor], None],
        start: int,
        stream: Tensor | None,
    ) -> Tensor:
        self.work.blocks += (layout.n_layers - start) * ids.numel()
        return hooks.run(layout, ids, wanted, visit, start=start, stream=stream)

    def _compare(
        self,
        reference: Tensor,
        held: Sequence[tuple[Cell, Tensor]],
        facts: Mapping[str, Tensor],
        met: Callable[[Cell, LogitPair], None],
    ) -> None:
        if not held:
            return
        for start in range(0, len(reference), CHUNK):
            part = slice(start, start + CHUNK)
            teacher = log_probs(self.teacher, reference[part])
            self.work.head += len(teacher) * (1 + len(held))
            device = teacher.device
            here = {name: fact[part].to(device) for name, fact in facts.items()}
            pair = None
            for cell, states in held:
                student = log_probs(self.base.layout, states[part]).to(device)
                pair = (
                    LogitPair(teacher, student, **here)
                    if pair is None
                    else pair.with_student(student)
                )
                met(cell, pair)


def _facts(ids: Tensor, docs: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Target (-1: none), document and position of each scored prediction."""
    following = torch.full_like(ids, -1)
    following[:, :-1] = ids[:, 1:]
    rows = rows.to(ids.device)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return {
        "targets": following.flatten()[rows],
        "docs": docs[:, None].expand_as(ids).flatten()[rows],
        "positions": positions.flatten()[rows],
    }


def _nothing(_tap: Tap, _value: Tensor) -> None:
    """No tap: only the final states are wanted."""
