"""What is kept of each cell and task: sums per document, so parts merge and a run can go on; and rows made of them.

Rows of the table, stage `scan`: `student` is the mechanism, `layer` the one it was put into (empty for a swap of
several), `head` that of a scan by heads (or by kv heads), `site` is logits. Text is `kl`, `nll`, `top1` as in a
trace. A task's metric is its own name, with stats

    nll_second, logprob        what the student reads: nats per token of the second copy; per key of the passkey, per
                               digit of needles and kv_lookup
    ..._minus_teacher          the same minus the teacher's, on the same tokens
    kl, disagree               KL and top-1 disagreement on the scored predictions
    X_minus_C                  the paired difference of X to the control C in the same layer

A cell whose activations are not finite has rows without a value: not 0, and not nothing either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add, sub
from typing import Any

import numpy as np

from mismatch.metrics.base import LogitPair, PerDocument, Reading, TokenSums
from mismatch.metrics.sums.meter import StudentMeter
from mismatch.probes.base import TEACHER
from mismatch.stages.scan.cells import Cell
from mismatch.stages.scan.tasks import Task
from mismatch.stages.scan.unit_sums import UnitSums

METRICS = ("kl", "nll", "top1")


class Sums:
    """The sums of some cells over some tasks.

    Args:
        cells: whose.
        tasks: of which.
    """

    def __init__(self, cells: Iterable[Cell], tasks: Iterable[Task]) -> None:
        self.cells, self.tasks = tuple(cells), tuple(tasks)
        self.meters = {
            (cell.key, task.name): StudentMeter(
                METRICS, n_docs=task.n_docs, n_pos=task.ids.shape[1], units=task.units
            )
            for cell in self.cells
            for task in self.tasks
        }
        self.broken: set[tuple[str, str]] = set()
        """Cell and task whose activations were not finite."""

    def update(self, cell: Cell, task: Task, pair: LogitPair) -> None:
        self.meters[cell.key, task.name].update(pair)

    def state(self) -> dict[str, np.ndarray]:
        """Every sum by name; the broken cells are flags beside them."""
        arrays = {
            f"{task}//{key}//{name}": array
            for (key, task), meter in self.meters.items()
            for name, array in meter.state().items()
        }
        flags = {f"{task}//{key}//broken": np.ones(1, np.int8) for key, task in self.broken}
        return arrays | flags

    def load(self, state: Mapping[str, np.ndarray]) -> Sums:
        """Takes over every cell of the state that is known here; others are left alone."""
        groups: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        for key, array in state.items():
            task, cell, name = key.split("//")
            groups.setdefault((cell, task), {})[name] = array
        for address, arrays in groups.items():
            if arrays.pop("broken", None) is not None:
                self.broken.add(address)
            self.meters[address].load(arrays)
        return self

    def part(self, cell: Cell, task: Task, metric: str) -> TokenSums:
        return self.meters[cell.key, task.name].parts[metric]

    def rows(self, controls: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
        """The rows of the table, without run id.

        Args:
            controls: by column, the controls it is compared with in the same layer and head.
        """
        at = {(cell.name, cell.layer, cell.head): cell for cell in self.cells}
        for task in self.tasks:
            for cell in self.cells:
                place, names = (cell.layer, cell.head), controls.get(cell.name, ())
                others = [at.get((name, *place)) for name in names]
                for metric, reading in self._readings(cell, task, [o for o in others if o]):
                    yield _row(cell, metric, reading)

    def _readings(
        self, cell: Cell, task: Task, controls: Sequence[Cell]
    ) -> Iterator[tuple[str, Reading]]:
        if (cell.key, task.name) in self.broken:
            metric, stat = ("kl", "mean") if not task.reading else (task.name, task.reading)
            yield metric, Reading(stat, math.nan)
            return
        fit = [c for c in controls if (c.key, task.name) not in self.broken]
        if not task.reading:
            yield from self.meters[cell.key, task.name].read()
            for metric, column in (("kl", "kl"), ("nll", "shift")):
                for control in fit:
                    ours, theirs = (
                        self.part(one, task, metric).per_document(column) for one in (cell, control)
                    )
                    less = (ours - theirs).mean()
                    yield metric, Reading.of(f"mean_minus_{control.name}", less)
            return
        for stat, column in ((task.reading, "student"), (f"{task.reading}_minus_teacher", "shift")):
            yield task.name, self.loss(cell, task, column, stat)
        yield task.name, self.part(cell, task, "kl").mean("kl", "kl")
        yield task.name, self.part(cell, task, "top1").mean("disagree", "disagree")
        for control in fit:
            stat = f"{task.reading}_minus_{control.name}"
            yield task.name, self.loss(cell, task, "student", stat, control)

    def teacher_rows(self) -> Iterator[dict[str, Any]]:
        """What the teacher itself reads on each task: its NLL on the scored tokens."""
        for task in self.tasks:
            cell = next((c for c in self.cells if (c.key, task.name) not in self.broken), None)
            if cell is None or not task.reading:
                continue
            teacher = Cell(TEACHER, None, (), 0)
            reading = self.loss(cell, task, "teacher", task.reading)
            yield _row(teacher, task.name, reading) | {"swapped": False}

    def loss(
        self, cell: Cell, task: Task, column: str, stat: str, minus: Cell | None = None
    ) -> Reading:
        """The log-loss of the right tokens (negative for a log-probability), with its interval."""
        lost = self.part(cell, task, "nll").per_document(column)
        if minus is not None:
            lost -= self.part(minus, task, "nll").per_document(column)
        of_itself = column != "shift" and minus is None  # a log-loss; the others are differences
        found = self._reading(stat, replace(lost, positive=of_itself), task)
        if task.reading != "logprob":
            return found
        return replace(found, value=-found.value, lo=-found.hi, hi=-found.lo)

    def total(self, cells: Sequence[Cell], task: Task) -> Reading:
        """The sum of the damage of several cells (KL, or log-loss), read together."""
        return self._linear(cells, (), task, "sum")

    def minus_total(self, cell: Cell, cells: Sequence[Cell], task: Task) -> Reading:
        """What one cell costs more than the sum of others: how far from additive it is."""
        return self._linear([cell], cells, task, "minus_sum")

    def units(self) -> dict[str, UnitSums]:
        """By task, what each cell that is finite lost in each unit."""
        found = {}
        for task in self.tasks:
            metric, column = ("nll", "shift") if task.reading else ("kl", "kl")
            parts = {
                cell.key: self.part(cell, task, metric).per_document(column)
                for cell in self.cells
                if (cell.key, task.name) not in self.broken
            }
            if parts:
                found[task.name] = UnitSums.of(parts)
        return found

    def damage(self, cell: Cell, task: Task) -> Reading:
        """KL on text; elsewhere what the right tokens lost, per token or per key. Larger is worse."""
        return self._linear([cell], (), task, "damage")

    def _linear(
        self, plus: Sequence[Cell], minus: Sequence[Cell], task: Task, stat: str
    ) -> Reading:
        metric, column = ("nll", "shift") if task.reading else ("kl", "kl")
        if any((cell.key, task.name) in self.broken for cell in (*plus, *minus)):
            return Reading(stat, math.nan)
        parts = [self.part(cell, task, metric).per_document(column) for cell in (*plus, *minus)]
        lost = reduce(add, parts[: len(plus)])
        return self._reading(stat, reduce(sub, parts[len(plus) :], lost), task)

    def _reading(self, stat: str, lost: PerDocument, task: Task) -> Reading:
        """The mean over tokens, or over rows where a task is summed over the predictions of a row."""
        counts = lost.counts
        if task.summed:
            counts = np.bincount(task.docs % len(counts), minlength=len(counts))
        mean = replace(lost, counts=counts).mean()
        return Reading.of(stat, mean._replace(n=lost.n))


def _row(cell: Cell, metric: str, reading: Reading) -> dict[str, Any]:
    return {
        "stage": "scan",
        "mode": "free",
        "student": cell.name,
        "layer": cell.layer,
        "head": cell.head,
        "site": "logits",
        "metric": metric,
        **reading.as_row(),
        "swapped": True,
    }
