"""One plan as a job: scan, choice, judgement, then table, picture and the swap to go on with."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from mismatch.errors import DataError, RunError, UsageError
from mismatch.runs.folder import Run, RunFolder, load_run, run_id
from mismatch.runs.table import as_table
from mismatch.stages.plan.choose import Score, choose
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.plan.greedy import greedy
from mismatch.stages.plan.measured import Choice, Measured, evaluate, swap_of
from mismatch.stages.plan.result import Planned
from mismatch.stages.reporting import write_html
from mismatch.stages.scan.atlas import atlas_data
from mismatch.stages.scan.prepared import Prepared
from mismatch.stages.scan.stage import ScanJob, sweep_of
from mismatch.stages.scan.start import create
from mismatch.stages.scan.tasks import Task, tasks
from mismatch.stages.scan.words import can_do
from mismatch.stages.trace.stage import peak_memory, settings
from mismatch.surgery.students import Teacher
from mismatch.texts.windows import Windows, windows


@dataclass
class PlanJob:
    """Everything one plan needs. `run()` does it.

    Args:
        config: the settings.
        teacher: the untouched model.
        prepared: the scan that chooses.
        scan: a finished scan in its place.
        folder: the run folder; None writes nothing. The scan becomes a run of its own beside it.
        overwrite: the scan may take the place of an earlier one.
        progress: bars on stderr.
    """

    config: PlanConfig
    teacher: Teacher
    prepared: Prepared
    scan: Run | None = None
    folder: RunFolder | None = None
    overwrite: bool = False
    progress: bool = False

    def run(self) -> Planned:
        """Make the plan.

        Raises:
            KeyboardInterrupt: stopped; the run folder then says `interrupted`.
            MismatchError: what can go wrong; the run folder then says `failed`.
        """
        try:
            return self._run(time.monotonic())
        except KeyboardInterrupt:
            if self.folder is not None:
                self.folder.finish("interrupted")
            raise
        except Exception as error:
            if self.folder is not None:
                # On a full disk this fails too; what went wrong first is what the user must hear.
                with suppress(RunError):
                    self.folder.finish("failed", error=str(error))
            raise

    def _run(self, started: float) -> Planned:
        judging, left_out = self._judging()
        choice, facts = self._greedy() if self.config.method == "greedy" else self._exact()
        chosen = time.monotonic()
        count = 2 + len(self.config.controls) + sum(map(len, choice.values()))
        with self._bar("judging", count, judging) as advance:
            measured = evaluate(
                self.teacher, self.config, choice, judging, self.prepared.calibration, advance
            )
        seconds = {"choice": chosen - started, "judgement": time.monotonic() - chosen}
        return self._finish(choice, measured, facts, left_out, seconds)

    def _judging(self) -> tuple[tuple[Task, ...], dict[str, str]]:
        """The tasks on which the choice is judged: text behind that of the scan, and other keys.

        Raises:
            DataError: the text ends with that of the scan.
        """
        config, teacher, prepared = self.config, self.teacher, self.prepared
        used = self._windows_used()
        whole = windows(
            prepared.held_out,
            teacher.tokenizer,
            config.seq_len,
            used * config.seq_len + config.tokens,
            config.seed,
        )
        if len(whole) <= used:
            raise DataError(
                f"{prepared.held_out.source} has {len(whole)} windows of --seq-len {config.seq_len}; the "
                f"choice is made from {used} of them, and none is left to judge it on",
                hint="take fewer --tokens, a shorter --seq-len, or longer text",
            )
        other = dataclasses.replace(config, seed=config.seed + 1)
        rest = behind(whole, used)
        return tasks(other, None, rest, teacher.tokenizer, teacher.model.config)

    def _windows_used(self) -> int:
        """Windows, from the first one on, that the choice is made from."""
        if self.scan is None:
            return len(self.prepared.cut)
        theirs = self.scan.config
        mine = self.config.to_dict()
        same = all(theirs.get(name) == mine[name] for name in ("data", "seq_len", "seed"))
        text = self.scan.manifest.get("text") or {}
        return int(text.get("windows", 0)) if same else 0

    def _exact(self) -> tuple[Choice, dict[str, Any]]:
        run = self._scanned() if self.scan is None else self.scan
        scores = scores_of(run, [str(t) for t in self.config.templates], self.prepared.layers)
        self._check_retrieval(run.table, run.plan)
        budget = self.config.budget_retrieval if self.config.keep_retrieval else None
        found = choose(
            scores, self.config.layers, budget_kl=self.config.budget_kl, budget_lost=budget
        )
        choice: dict[str, list[int]] = {}
        for score in found:
            choice.setdefault(score.mechanism, []).append(score.layer)
        said = {"kl": sum(s.kl for s in found), "lost": sum(s.charged for s in found)}
        ours = {"scan": run.run_id, "scores": [dataclasses.asdict(s) for s in scores]}
        return choice, {**ours, "predicted_by_scan": said}

    def _scanned(self) -> Run:
        """A scan of its own: it is kept whatever becomes of the plan, and can be chosen from again."""
        config, folder = self.config.scan_config(), None
        if self.folder is not None:
            config = dataclasses.replace(config, output=str(scan_beside(self.folder.path)))
            folder = create(config, self.overwrite)
        path = None if folder is None else folder.path
        job = ScanJob(config, self.teacher, self.prepared, folder, path, progress=self.progress)
        return job.run().run

    def _check_retrieval(self, table: pd.DataFrame, plan: dict[str, Any]) -> None:
        if not self.config.keep_retrieval:
            return
        if not (table["metric"] == "passkey").any():
            raise UsageError(
                "--keep-retrieval needs a passkey, and none was asked: "
                + self.prepared.left_out.get("passkey", "the scan left it out"),
                hint="take a --length that fits, or leave --keep-retrieval out",
            )
        if not can_do(table, "passkey", plan):
            raise UsageError(
                "--keep-retrieval, but the model itself does not find the passkey: there is nothing to keep",
                hint="a shorter --length may be easier; or leave --keep-retrieval out",
            )

    def _greedy(self) -> tuple[Choice, dict[str, Any]]:
        config, prepared = self.config, self.prepared
        wanted = ("text", "passkey") if config.keep_retrieval else ("text",)
        asked = tuple(task for task in prepared.tasks if task.name in wanted)
        if config.keep_retrieval and len(asked) < 2:
            self._check_retrieval(pd.DataFrame({"metric": []}), {})
        sweep = sweep_of(self.teacher, config, prepared.cells, prepared.calibration)
        there, most = len(prepared.cells), len(prepared.layers)
        taken = range(min(config.layers or most, most))
        # After each step the cells of one layer are gone.
        runs = sum(there - round(at * there / most) for at in taken)
        with self._bar("greedy", runs, asked) as advance:
            steps = greedy(sweep, prepared.cells, asked, config, advance)
        choice: dict[str, list[int]] = {}
        for step in steps:
            choice.setdefault(step.cell.name, []).append(step.cell.layer)
        path = [
            {
                "layer": step.cell.layer,
                "mechanism": step.cell.name,
                "kl": step.kl.value,
                "lo": step.kl.lo,
                "hi": step.kl.hi,
                "lost": step.lost,
            }
            for step in steps
        ]
        return choice, {"steps": path}

    @contextmanager
    def _bar(self, what: str, cells: int, asked: Sequence[Task]) -> Iterator[Callable[[int], None]]:
        size = self.config.batch_size * self.config.seq_len
        batches = sum(1 for task in asked for _ in task.batches(size))
        bar = tqdm(
            total=cells * batches,
            desc=what,
            unit="run",
            file=sys.stderr,
            disable=None if self.progress else True,
        )
        with bar:
            yield bar.update

    def _finish(
        self,
        choice: Choice,
        measured: Measured,
        found: dict[str, Any],
        left_out: dict[str, str],
        seconds: dict[str, float],
    ) -> Planned:
        config, teacher, prepared = self.config, self.teacher, self.prepared
        swap = swap_of(config, choice)
        plan = {
            "model": config.model,
            "swap": swap,
            "method": config.method,
            "choice": {name: sorted(layers) for name, layers in choice.items()},
            "n_layers": prepared.n_layers,
            "among": list(prepared.layers),
            "budgets": {
                "kl": config.budget_kl,
                "lost": config.budget_retrieval if config.keep_retrieval else None,
            },
            "tasks": {
                task.name: {
                    "chance": task.chance, "scored": int(task.asked.sum()), "documents": task.n_docs
                }
                for task in measured.sums.tasks
            },
            "notes": prepared.notes() + [f"{t} is not judged: {why}" for t, why in left_out.items()],
            "clauses": [],
            **found,
        }  # fmt: skip
        facts = {
            "kind": "plan",
            "model_info": teacher.info.as_dict(),
            "dtype": str(teacher.model.dtype).removeprefix("torch."),
            "device": str(teacher.layout.embedding_device),
            "seed": config.seed,
            "seconds": {name: round(spent, 1) for name, spent in seconds.items()},
            "peak_memory_bytes": peak_memory(),
        }
        rows = [
            *measured.rows(),
            *(row | {"stage": "plan"} for row in measured.sums.teacher_rows()),
        ]
        if self.folder is None:
            name = run_id(config.model, swap, settings(config))
            frame = as_table([row | {"run_id": name} for row in rows])
            about = {"run_id": name, "status": "done", "model": config.model, **facts}
            return Planned(Run.in_memory(frame, about, plan, settings(config)))
        self.folder.write_plan(plan)
        self.folder.write_table(rows)
        self.folder.finish("done", **facts)
        write_html(self.folder.path)
        self.folder.log("done")
        return Planned(load_run(self.folder.path))


def scan_beside(path: Path) -> Path:
    """Where the scan of a plan is written."""
    return path.with_name(f"{path.name}-scan")


def behind(cut: Windows, first: int) -> Windows:
    """The windows from `first` on, their documents numbered anew."""
    docs = cut.doc[first:].tolist()
    order = {doc: at for at, doc in enumerate(dict.fromkeys(docs))}
    numbers = np.array([order[doc] for doc in docs], np.int64)
    names = tuple(cut.names[doc] for doc in order)
    return dataclasses.replace(cut, ids=cut.ids[first:], doc=numbers, names=names)


def scores_of(run: Run, names: Sequence[str], layers: Sequence[int]) -> list[Score]:
    """The cells of a scan that may be chosen.

    Raises:
        UsageError: the scan is not of these mechanisms, or asked no text.
    """
    data = atlas_data(run.table)
    data = data[(data["kind"] != "missing") & data["layer"].isin(list(layers))]
    there = set(data["student"])
    if missing := [name for name in names if name not in there]:
        raise UsageError(
            f"the scan {run.run_id} has no `{missing[0]}`",
            hint=f"it has {', '.join(sorted(there))}; scan it, or leave --scan out",
        )
    text = data[data["task"] == "text"].set_index(["student", "layer"])["value"]
    lost = data[data["task"] == "passkey"].set_index(["student", "layer"])["value"]
    if text.empty:
        raise UsageError(
            f"the scan {run.run_id} did not ask for text, so no layer has a KL to choose by",
            hint="scan with the task text, or leave --scan out",
        )
    return [
        Score(int(layer), name, float(kl), float(lost.get((name, layer), 0.0)))
        for (name, layer), kl in text.items()
        if name in names
    ]


def same_model(run: Run | None, teacher: Teacher) -> None:
    """Whether a scan is of this very model.

    Raises:
        UsageError: it is no scan, or its weights are others.
    """
    if run is None:
        return
    of = run.manifest.get("model_info", {}).get("sha256")
    if run.manifest.get("kind") != "scan" or of != teacher.info.sha256:
        what = "is no scan" if run.manifest.get("kind") != "scan" else "is of another model"
        raise UsageError(
            f"the run in {run.path} {what}",
            hint="give a folder that `mismatch scan` made of this very model",
        )
