"""A choice of layers, measured: together, one at a time, and with the control in their place, on the same inputs.

One at a time is measured again here: the numbers that a choice was made by are too good, for it took the smallest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mismatch.metrics.sums.readings import Reading
from mismatch.models.layout import Layout
from mismatch.runs.ranks import ALONE, Ranks
from mismatch.runs.table import SWAP
from mismatch.spec import Range, Spec, Template
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.scan.batches import measure, prove, prove_restored
from mismatch.stages.scan.cells import Cell, control_of, joint
from mismatch.stages.scan.stage import sweep_of
from mismatch.stages.scan.sums import Sums
from mismatch.stages.scan.tasks import Task
from mismatch.surgery.operate import placed
from mismatch.surgery.students import Teacher
from mismatch.texts.windows import Windows

Choice = Mapping[str, Sequence[int]]
"""The layers of each mechanism, by its name."""


@dataclass(frozen=True)
class Measured:
    """What a choice costs.

    Attributes:
        sums: of all cells.
        together: the joint swap.
        parts: each of its layers alone.
        controls: the control in the same places.
    """

    sums: Sums
    together: Cell
    parts: tuple[Cell, ...]
    controls: tuple[Cell, ...]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of the table, stage `plan`: student `swap` is the joint one. Besides those of a scan:

        kl            sum_of_parts, mean_minus_sum     the layers one at a time, added up; what together costs more
        task          lost, lost_sum_of_parts, lost_minus_sum     the same in nats that the right tokens lost
        """
        compared = {SWAP: [cell.name for cell in self.controls]}
        for row in self.sums.rows(compared):
            yield row | {"stage": "plan"}
        for task in self.sums.tasks:
            metric = task.name if task.reading else "kl"
            stem = "lost" if task.reading else "mean"
            apart, rest = self.sums.total(self.parts, task), self.rest(task)
            found = [
                ("lost_sum_of_parts" if task.reading else "sum_of_parts", apart),
                (f"{stem}_minus_sum", rest),
            ]
            if task.reading:
                found.append(("lost", self.sums.damage(self.together, task)))
            for stat, reading in found:
                yield _row(metric, stat, reading)

    def rest(self, task: Task) -> Reading:
        """What together costs more than the sum of its parts."""
        return self.sums.minus_total(self.together, self.parts, task)


def evaluate(
    teacher: Teacher,
    config: PlanConfig,
    choice: Choice,
    tasks: Sequence[Task],
    calibration: Windows | None,
    progress: Callable[[int], None] = lambda runs: None,
    ranks: Ranks = ALONE,
) -> Measured:
    """Measure a choice.

    Args:
        teacher: the untouched model.
        config: the settings.
        choice: what goes where.
        tasks: that chose nothing.
        calibration: windows for mechanisms that set themselves from them.
        progress: told how many runs of a cell were done.
        ranks: who we are among how many: they share the cells.
    """
    cells = cells_of(config, choice, teacher.layout)
    together, parts, controls = cells
    every = sorted((together, *controls, *parts), key=lambda cell: cell.first)
    sweep = sweep_of(teacher, config, every, calibration)
    prove(sweep, every)
    size = config.batch_size * config.seq_len
    sums = measure(sweep, every, tasks, batch_tokens=size, ranks=ranks, progress=progress)
    prove_restored(sweep)
    return Measured(sums, together, parts, controls)


def cells_of(
    config: PlanConfig, choice: Choice, layout: Layout
) -> tuple[Cell, tuple[Cell, ...], tuple[Cell, ...]]:
    """The joint swap, its parts, and each control in all of its places."""
    by_name = {str(template): template for template in config.templates}
    used = {by_name[name]: tuple(sorted(layers)) for name, layers in choice.items() if layers}
    parts = tuple(
        Cell(str(template), layer, placed(template.at(layer), layout), layer)
        for template, layers in used.items()
        for layer in layers
    )
    controls = []
    for control in config.controls:
        places: dict[str, tuple[Template, list[int]]] = {}
        for template, layers in used.items():
            stand = control_of(template, control)
            places.setdefault(str(stand), (stand, []))[1].extend(layers)
        controls.append(joint(control, _over(places.values()), layout))
    return joint(SWAP, _over(used.items()), layout), parts, tuple(controls)


def swap_of(config: PlanConfig, choice: Choice) -> str:
    """The choice as a swap text, for `mismatch trace`."""
    by_name = {str(template): template for template in config.templates}
    return str(_over((by_name[name], layers) for name, layers in choice.items() if layers))


def _over(places: Any) -> Spec:
    clauses = [
        clause for template, layers in places for clause in template.over(_ranges(layers)).clauses
    ]
    return Spec(tuple(clauses), "")


def _ranges(layers: Sequence[int]) -> tuple[Range, ...]:
    """Layers as they are written: 3, 4, 5, 9 is `3-5,9`."""
    found: list[Range] = []
    for layer in sorted(layers):
        if found and found[-1].last == layer - 1:
            found[-1] = Range(found[-1].first, layer)
        else:
            found.append(Range(layer, layer))
    return tuple(found)


def _row(metric: str, stat: str, reading: Reading) -> dict[str, Any]:
    return {
        "stage": "plan",
        "mode": "free",
        "student": SWAP,
        "layer": None,
        "site": "logits",
        "metric": metric,
        **reading.as_row(),
        "stat": stat,
        "swapped": True,
    }
