"""`mismatch scan`: every mechanism in every layer, one at a time, measured on all tasks in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mismatch.errors import NumericsError, UsageError
from mismatch.forward.calibrate import calibrate
from mismatch.stages.base import Outcome, Stage
from mismatch.stages.opening import Opened
from mismatch.stages.scan.batches import measure, prove, prove_restored
from mismatch.stages.scan.cells import Cell, calibrators
from mismatch.stages.scan.config import ScanConfig, SweepConfig
from mismatch.stages.scan.plan import ColumnPlan, ScanPlan, TaskPlan
from mismatch.stages.scan.prepared import Prepared, prepare
from mismatch.stages.scan.result import Scanned
from mismatch.stages.scan.sums import Sums
from mismatch.stages.scan.sweep import Sweep
from mismatch.stages.scan.tasks import Task
from mismatch.surgery.operate import blank
from mismatch.surgery.students import Teacher
from mismatch.texts.windows import Windows


class Scan(Stage[ScanConfig, Prepared]):
    help = "Put every mechanism into every layer, one layer at a time, and draw the atlas."
    Config = ScanConfig
    Result = Scanned
    examples = (
        'mismatch scan --model smollm2 --swap "infini(segment=64); nope; sliding_window(64, 1)"',
        'mismatch scan --model smollm2 --swap "sliding_window(64, 1)" --by kv-head --among 16-19',
    )
    report = "mismatch.stages.scan.report"
    plan = "mismatch.stages.scan.plan:ScanPlan"
    student = False
    resumable = True
    distributed = True

    def prepare(self, opened: Opened[ScanConfig]) -> Prepared:
        prepared = prepare(opened)
        if len(prepared.cells) < opened.ranks.world:
            raise UsageError(
                f"{opened.ranks.world} processes for {len(prepared.cells)} cells: some would have none",
                hint="start fewer, or scan more layers",
            )
        return prepared

    def announce(self, opened: Opened[ScanConfig], prepared: Prepared) -> str:
        return prepared.text(opened.config)

    def run(self, opened: Opened[ScanConfig], prepared: Prepared) -> Outcome | None:
        config, ranks = opened.config, opened.ranks
        mine = [cell for i, cell in enumerate(prepared.cells) if ranks.mine(i)]
        prints = opened.fingerprints()
        if opened.folder is not None:
            opened.folder.update(fingerprints=prints)
            opened.folder.log(f"{len(prepared.cells)} cells, {len(prepared.tasks)} tasks")

        def filled(config: ScanConfig) -> tuple[Sweep, Sums]:
            sweep = sweep_of(opened.teacher, config, mine, prepared.calibration)
            prove(sweep, mine)
            size = config.batch_size * config.seq_len
            batches = sum(1 for task in prepared.tasks for _ in task.batches(size))
            what = f"{len(mine)} cells x {batches} batches"
            with opened.bar(len(mine) * batches, what, "run") as bar:
                sums = measure(
                    sweep,
                    prepared.cells,
                    prepared.tasks,
                    batch_tokens=size,
                    ranks=ranks,
                    state=opened.state(),
                    fingerprint=prints,
                    progress=bar.update,
                )
            prove_restored(sweep)
            return sweep, sums

        sweep, sums = opened.fitting(filled, "in the scan")
        work = ranks.to_first(sweep.work.as_dict())
        if work is None:
            return None
        facts = {
            "work": _work(work, prepared),
            "not_finite": sorted(f"{key}: {task}" for key, task in sums.broken),
        }
        rows = [*sums.rows(prepared.controls), *sums.teacher_rows()]
        return Outcome(rows, _plan(config, prepared, sums), facts, memory={"sums": sums})

    def exit_code(self, config: ScanConfig, result: Scanned) -> int:
        return 0 if result.finite else NumericsError.exit_code


def _plan(config: ScanConfig, prepared: Prepared, sums: Sums) -> ScanPlan:
    return ScanPlan(
        model=config.model,
        columns=tuple(ColumnPlan(c.name, c.control, c.controls) for c in prepared.columns),
        layers=prepared.layers,
        n_layers=prepared.n_layers,
        tasks={task.name: task_plan(task) for task in prepared.tasks},
        notes=(*prepared.notes(), *_broken(sums, prepared)),
        by=config.by,
        units=sums.units(),
    )


def _work(parts: Sequence[Mapping[str, int]], prepared: Prepared) -> dict[str, Any]:
    """What was run, also in forwards of the whole model's blocks over all tokens."""
    work = {name: sum(part[name] for part in parts) for name in parts[0]}
    tokens = sum(task.ids.size for task in prepared.tasks)
    forwards = work["block_tokens"] / (prepared.n_layers * tokens)
    return {**work, "tokens": tokens, "forwards_of_blocks": round(forwards, 2)}


def sweep_of(
    teacher: Teacher, config: SweepConfig, cells: Sequence[Cell], calibration: Windows | None
) -> Sweep:
    """The tree that cells are put into, and what they set themselves from.

    Args:
        teacher: the untouched model.
        config: the settings.
        cells: that will be put in.
        calibration: windows for those that set themselves from text; None: none of them does.
    """
    wanted = calibrators(cells)
    if wanted:
        assert calibration is not None
        device, parts = teacher.layout.embedding_device, calibration.batches(config.batch_size)
        batches = (torch.from_numpy(part.ids).to(device) for part in parts)
        calibrate(teacher.layout, wanted, batches)
    base = blank(teacher.layout, tokenizer=teacher.tokenizer)
    return Sweep(teacher.layout, base, config.seed, wanted)


def _broken(sums: Sums, prepared: Prepared) -> list[str]:
    keys = {cell.key: cell for cell in prepared.cells}
    return [
        f"{keys[key].name} in {keys[key].where}: NaN or infinity on {task}"
        for key, task in sorted(sums.broken)
    ]


def task_plan(task: Task) -> TaskPlan:
    """What plan.json holds of a task."""
    return TaskPlan(
        scored=int(task.asked.sum()),
        documents=task.n_docs,
        chance=task.chance,
        rows=len(task.ids),
        length=task.ids.shape[1],
        reading=task.reading or "kl",
    )
