"""One trace as a job: text, swap and controls, the loop, then table, findings, figures and report."""

from __future__ import annotations

import copy
import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mismatch import registry, spec
from mismatch.config import ELSEWHERE, RunConfig, TraceConfig
from mismatch.errors import MismatchError, RunError
from mismatch.forward import hooks
from mismatch.models.layout import Layout
from mismatch.models.load import ModelError
from mismatch.runs import table
from mismatch.runs.folder import Run, RunFolder, load_run, run_id
from mismatch.runs.ranks import Ranks
from mismatch.runs.state import State
from mismatch.stages.checking import Text, plan_dict, plan_warnings
from mismatch.stages.reporting import write_html
from mismatch.stages.trace.batches import measure
from mismatch.stages.trace.findings import Evidence, Finding, findings_of
from mismatch.stages.trace.meters import Collector
from mismatch.stages.trace.result import Result
from mismatch.surgery.loading import load
from mismatch.surgery.operate import Student
from mismatch.surgery.students import Teacher, students_of


@dataclass
class Job:
    """Everything one trace needs. `run()` does it.

    Args:
        config: the settings.
        teacher: the untouched model.
        text: what to measure and to calibrate on.
        student: a student that is there already; None swaps as the config says.
        folder: the run folder, on the first rank; None writes nothing.
        path: of the run folder, on every rank.
        ranks: who we are among how many.
        progress: a bar on stderr.
        after: what else is asked of the students, behind the trace on the first rank: rows for the same table.
    """

    config: TraceConfig
    teacher: Teacher
    text: Text
    student: Student | None = None
    folder: RunFolder | None = None
    path: Path | None = None
    ranks: Ranks = field(default_factory=Ranks)
    progress: bool = False
    after: Callable[[Teacher, list[Student]], list[dict[str, Any]]] | None = None

    def run(self) -> Result:
        """Do the trace.

        Raises:
            KeyboardInterrupt: stopped at a batch border; `.run_dir` is set when the run can be resumed.
            MismatchError: what else can go wrong; the run folder then says `failed`.
        """
        started = time.monotonic()
        try:
            result = self._run(started)
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
            raise
        return result

    def _run(self, started: float) -> Result:
        config, teacher = self.config, self.teacher
        cut = self.text.cut
        students = students_of(teacher, config, self.text.calibration, self.student)
        swap = students[0]
        collector = Collector(
            teacher.layout,
            {s.name: s.layout for s in students},
            {s.name: s.plan.layers for s in students},
            config.metrics or default_metrics(),
            n_docs=cut.n_docs,
            n_pos=cut.seq_len,
            n_tokens=cut.tokens,
            sample=min(1.0, config.moment_tokens / cut.tokens),
            seed=config.seed,
            everywhere=config.metrics is not None,
        )
        prints = {
            "settings": config.fingerprint(),
            "model": teacher.info.sha256,
            "text": cut.fingerprint,
        }
        prints["ranks"] = str(self.ranks.world)
        if self.folder is not None:
            self.folder.write_plan(plan_dict(swap.plan, plan_warnings(swap.plan, cut.seq_len)))
            self.folder.update(fingerprints=prints, model_info=teacher.info.as_dict())
            self.folder.log(
                f"{len(cut)} windows of {cut.n_docs} documents, {len(students)} students"
            )
        reference = self._reference()
        loaded = time.monotonic()
        with self._bar() as advance:
            self._measure(
                teacher.layout,
                students,
                collector,
                cut,
                batch_size=config.batch_size,
                reference=reference,
                ranks=self.ranks,
                state=self._state(),
                fingerprint=prints,
                progress=advance,
                run=_backend(config.backend),
            )
        result = None
        if self.ranks.first:
            seconds = {
                "setup": round(loaded - started, 1),
                "run": round(time.monotonic() - loaded, 1),
            }
            floor = (
                "the text in another batch shape" if reference is None else "the model in float32"
            )
            rows = collector.rows() + ([] if self.after is None else self.after(teacher, students))
            result = self._finish(rows, swap, {"seconds": seconds, "floor": floor})
        if self.ranks.world == 1:
            return result
        # Only the first rank holds the whole; the others read what it wrote.
        findings = self.ranks.from_first(None if result is None else result.findings)
        return Result(load_run(self.path), findings)

    def _measure(self, *args: Any, **options: Any) -> None:
        """`measure`; a failure of another rank than the first is told here, for torchrun then ends the first one."""
        try:
            measure(*args, **options)
        except MismatchError as error:
            if not self.ranks.first:
                print(f"error (rank {self.ranks.rank}): {error}", file=sys.stderr)
            raise

    def _state(self) -> State | None:
        """Where this rank saves: beside the run, the first rank in front, the others below."""
        if self.path is None:
            return None
        folder = self.path / "state"
        return State(folder if self.ranks.first else folder / f"rank{self.ranks.rank}")

    def _reference(self) -> Layout | None:
        """The model in float32, for the floor of a run in another format."""
        teacher, config = self.teacher, self.config
        if teacher.model.dtype == torch.float32 or not self.ranks.first:
            return None
        device = teacher.layout.embedding_device
        try:
            if teacher.info.path:
                return load(
                    teacher.info.path,
                    dtype="float32",
                    device=device,
                    trust_remote_code=config.trust_remote_code,
                    allow_pickle=config.allow_pickle,
                ).layout
            model = copy.deepcopy(teacher.model).float()
        except (torch.OutOfMemoryError, ModelError):
            return None  # the floor is then that of another batch shape alone
        return dataclasses.replace(teacher.layout, model=model)

    @contextmanager
    def _bar(self) -> Iterator[Callable[[int], None]]:
        """A progress bar over this rank's windows; silent when nobody looks."""
        cut, size = self.text.cut, self.config.batch_size
        mine = [batch for i, batch in enumerate(cut.batches(size)) if self.ranks.mine(i)]
        bar = tqdm(
            total=sum(len(batch.ids) for batch in mine),
            desc=f"{cut.n_docs} documents",
            unit="window",
            file=sys.stderr,
            disable=None if self.progress and self.ranks.first else True,
        )
        with bar:
            yield bar.update

    def _finish(
        self, rows: list[dict[str, Any]], swap: Student, measured: dict[str, Any]
    ) -> Result:
        config, cut, held_out = self.config, self.text.cut, self.text.held_out
        plan = plan_dict(swap.plan, plan_warnings(swap.plan, cut.seq_len))
        facts = {
            "model_info": self.teacher.info.as_dict(),
            "dtype": str(self.teacher.model.dtype).removeprefix("torch."),
            "device": str(self.teacher.layout.embedding_device),
            "attention": self.teacher.model.config._attn_implementation,
            "seed": config.seed,
            "text": {
                "source": held_out.source,
                "note": held_out.note,
                "documents": cut.n_docs,
                "windows": len(cut),
                "tokens": cut.tokens,
                "fingerprint": cut.fingerprint,
            },
            "ranks": self.ranks.world,
            "peak_memory_bytes": peak_memory(),
            **measured,
        }
        if self.folder is None:
            name = run_id(config.model, spec.format(config.swap_spec), settings(config))
            frame = table.as_table([row | {"run_id": name} for row in rows])
            run = Run.in_memory(
                frame, {"run_id": name, "status": "done", **facts}, plan, settings(config)
            )
            return Result(run, self._findings(frame, plan, swap))
        folder = self.folder
        frame = folder.write_table(rows)
        findings = self._findings(frame, plan, swap)
        folder.write_findings([finding.as_dict() for finding in findings])
        folder.finish("done", **facts)
        write_html(folder.path)
        folder.log("done")
        return Result(load_run(folder.path), findings)

    def _findings(self, frame: Any, plan: dict[str, Any], swap: Student) -> list[Finding]:
        return findings_of(
            Evidence(
                frame,
                swap.plan.layers,
                self.teacher.layout.n_layers,
                self.config.model,
                tuple(plan["clauses"]),
            )
        )


def default_metrics() -> tuple[str, ...]:
    """Every metric but those that cost much beside another one that says the same (`default = False`)."""
    known = registry.metrics()
    return tuple(name for name in known.names() if known.card(name).facts.get("default", True))


def settings(config: RunConfig) -> dict[str, Any]:
    """What config.yaml holds and the run id hashes: all that changes a number, not where the run lies."""
    return {name: value for name, value in config.to_dict().items() if name not in ELSEWHERE}


def _backend(name: str) -> Callable[..., torch.Tensor]:
    if name == "hooks":
        return hooks.run
    from mismatch.forward import nnsight_backend

    return nnsight_backend.run


def peak_memory() -> int:
    """Largest memory of this process so far, in bytes (the GPU's, when there is one)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
