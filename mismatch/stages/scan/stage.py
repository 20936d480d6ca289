"""One scan as a job: the cells, the tasks, then table, atlas and report."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mismatch.errors import MismatchError, RunError
from mismatch.forward.calibrate import calibrate
from mismatch.runs import table
from mismatch.runs.folder import Run, RunFolder, load_run, run_id
from mismatch.runs.ranks import Ranks
from mismatch.runs.state import State
from mismatch.stages.reporting import write_html
from mismatch.stages.scan.batches import measure, prove, prove_restored
from mismatch.stages.scan.cells import Cell, calibrators
from mismatch.stages.scan.config import ScanConfig, SweepConfig
from mismatch.stages.scan.prepared import Prepared
from mismatch.stages.scan.result import Scanned
from mismatch.stages.scan.sums import Sums
from mismatch.stages.scan.sweep import Sweep
from mismatch.stages.scan.tasks import Task
from mismatch.stages.trace.stage import peak_memory, settings
from mismatch.surgery.operate import blank
from mismatch.surgery.students import Teacher
from mismatch.texts.windows import windows


@dataclass
class ScanJob:
    """Everything one scan needs. `run()` does it.

    Args:
        config: the settings.
        teacher: the untouched model.
        prepared: cells, tasks and text.
        folder: the run folder, on the first rank; None writes nothing.
        path: of the run folder, on every rank.
        ranks: who we are among how many; each takes its own cells.
        progress: a bar on stderr.
    """

    config: ScanConfig
    teacher: Teacher
    prepared: Prepared
    folder: RunFolder | None = None
    path: Path | None = None
    ranks: Ranks = field(default_factory=Ranks)
    progress: bool = False

    def run(self) -> Scanned:
        """Do the scan.

        Raises:
            KeyboardInterrupt: stopped between two cells; `.run_dir` is set when the scan can be resumed.
            MismatchError: what else can go wrong; the run folder then says `failed`.
        """
        try:
            return self._run(time.monotonic())
        except KeyboardInterrupt as stop:
            if self.folder is not None:
                self.folder.finish("interrupted")
                stop.run_dir = self.folder.path
            raise
        except Exception as error:
            if self.folder is not None:
                # On a full disk this fails too; what went wrong first is what the user must hear.
                with suppress(RunError):
                    self.folder.finish("failed", error=str(error))
                    self.folder.log(f"failed: {error}")
            if isinstance(error, MismatchError) and not self.ranks.first:
                print(f"error (rank {self.ranks.rank}): {error}", file=sys.stderr)
            raise

    def _run(self, started: float) -> Scanned:
        config, prepared = self.config, self.prepared
        mine = [cell for i, cell in enumerate(prepared.cells) if self.ranks.mine(i)]
        prints = self._fingerprint()
        if self.folder is not None:
            self.folder.update(fingerprints=prints)
            self.folder.log(f"{len(prepared.cells)} cells, {len(prepared.tasks)} tasks")
        sweep = sweep_of(self.teacher, config, mine, prepared.calibration)
        prove(sweep, mine)
        begun = time.monotonic()
        with self._bar(len(mine)) as advance:
            sums = measure(
                sweep,
                prepared.cells,
                prepared.tasks,
                batch_tokens=config.batch_size * config.seq_len,
                ranks=self.ranks,
                state=self._state(),
                fingerprint=prints,
                progress=advance,
                seed=config.seed,
            )
        prove_restored(sweep)
        work = self.ranks.to_first(sweep.work.as_dict())
        result = None
        if self.ranks.first:
            seconds = {"setup": begun - started, "run": time.monotonic() - begun}
            facts = {
                "seconds": {name: round(spent, 1) for name, spent in seconds.items()},
                "work": self._work(work or []),
            }
            result = self._finish(sums, facts)
        return result if self.ranks.world == 1 else Scanned(load_run(self._written(result)))

    def _written(self, result: Scanned | None) -> Path:
        """The run folder, once the first rank has written it."""
        return self.ranks.from_first(None if result is None else result.run_dir) or self.path

    def _fingerprint(self) -> dict[str, str]:
        prepared, teacher = self.prepared, self.teacher
        return {
            "settings": self.config.fingerprint(),
            "model": teacher.info.sha256,
            "text": "none" if prepared.cut is None else prepared.cut.fingerprint,
            "ranks": str(self.ranks.world),
        }

    def _state(self) -> State | None:
        """Where this rank saves: beside the run, the first rank in front, the others below."""
        if self.path is None:
            return None
        folder = self.path / "state"
        return State(folder if self.ranks.first else folder / f"rank{self.ranks.rank}")

    @contextmanager
    def _bar(self, cells: int) -> Iterator[Callable[[int], None]]:
        """A progress bar over this rank's cells, each as often as there are batches; silent when nobody looks."""
        tokens = self.config.batch_size * self.config.seq_len
        batches = sum(1 for task in self.prepared.tasks for _ in task.batches(tokens))
        bar = tqdm(
            total=cells * batches,
            desc=f"{cells} cells x {batches} batches",
            unit="run",
            file=sys.stderr,
            disable=None if self.progress and self.ranks.first else True,
        )
        with bar:
            yield bar.update

    def _work(self, parts: list[dict[str, int]]) -> dict[str, Any]:
        """What was run, also in forwards of the whole model's blocks over all tokens."""
        work = {name: sum(part[name] for part in parts) for name in parts[0]}
        tokens = sum(task.ids.size for task in self.prepared.tasks)
        forwards = work["block_tokens"] / (self.prepared.n_layers * tokens)
        return {**work, "tokens": tokens, "forwards_of_blocks": round(forwards, 2)}

    def _finish(self, sums: Sums, measured: dict[str, Any]) -> Scanned:
        config, prepared, teacher = self.config, self.prepared, self.teacher
        plan = {
            "model": config.model,
            "columns": [_column(column) for column in prepared.columns],
            "layers": list(prepared.layers),
            "n_layers": prepared.n_layers,
            "tasks": {task.name: _task(task) for task in prepared.tasks},
            "notes": prepared.notes() + _broken(sums, prepared),
            "clauses": [],
        }
        facts = {
            "kind": "scan",
            "not_finite": sorted(f"{key}: {task}" for key, task in sums.broken),
            "model_info": teacher.info.as_dict(),
            "dtype": str(teacher.model.dtype).removeprefix("torch."),
            "device": str(teacher.layout.embedding_device),
            "attention": teacher.model.config._attn_implementation,
            "seed": config.seed,
            "text": _text(prepared),
            "ranks": self.ranks.world,
            "peak_memory_bytes": peak_memory(),
            **measured,
        }
        rows = [*sums.rows(prepared.controls), *sums.teacher_rows()]
        if self.folder is None:
            name = run_id(config.model, config.swap_text, settings(config))
            frame = table.as_table([row | {"run_id": name} for row in rows])
            about = {"run_id": name, "status": "done", "model": config.model, **facts}
            return Scanned(Run.in_memory(frame, about, plan, settings(config)), sums)
        folder = self.folder
        folder.write_plan(plan)
        folder.write_table(rows)
        folder.finish("done", **facts)
        write_html(folder.path)
        folder.log("done")
        return Scanned(load_run(folder.path), sums)


def sweep_of(
    teacher: Teacher, config: SweepConfig, cells: Sequence[Cell], calibration: Any
) -> Sweep:
    """The tree that cells are put into, and what they set themselves from."""
    wanted = calibrators(cells)
    if wanted:
        length = min(config.seq_len, config.calibration_tokens)
        cut = windows(
            calibration, teacher.tokenizer, length, config.calibration_tokens, config.seed
        )
        device = teacher.layout.embedding_device
        batches = (torch.from_numpy(part.ids).to(device) for part in cut.batches(config.batch_size))
        calibrate(teacher.layout, wanted, batches)
    base = blank(teacher.layout, tokenizer=teacher.tokenizer)
    return Sweep(teacher.layout, base, config.seed, wanted)


def _column(column: Any) -> dict[str, Any]:
    return {
        "name": column.name,
        "control": column.control,
        "controls": list(column.controls),
    }


def _broken(sums: Sums, prepared: Prepared) -> list[str]:
    keys = {cell.key: cell for cell in prepared.cells}
    return [
        f"{keys[key].name} in layer {keys[key].layer}: NaN or infinity on {task}"
        for key, task in sorted(sums.broken)
    ]


def _text(prepared: Prepared) -> dict[str, Any] | None:
    held_out, cut = prepared.held_out, prepared.cut
    if held_out is None or cut is None:
        return None
    return {
        "source": held_out.source,
        "note": held_out.note,
        "documents": cut.n_docs,
        "windows": len(cut),
        "tokens": cut.tokens,
        "fingerprint": cut.fingerprint,
    }


def _task(task: Task) -> dict[str, Any]:
    return {
        "rows": len(task.ids),
        "length": task.ids.shape[1],
        "scored": int(task.asked.sum()),
        "documents": task.n_docs,
        "reading": task.reading or "kl",
        "chance": task.chance,
    }
