"""One repair as a job: texts, student and its own tensors, the ladder, what is asked beside it, then table and report.

The swap stays as it was, beside a second student over the same teacher that learns: at the end both are judged, probed
and traced against one teacher, on the same held-out tokens.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mismatch import spec
from mismatch.errors import RunError
from mismatch.forward.heldout import Evaluated, HeldOut
from mismatch.runs import table
from mismatch.runs.folder import Run, RunFolder, load_run, run_id
from mismatch.runs.state import State
from mismatch.stages.checking import Text, plan_dict, plan_warnings
from mismatch.stages.probe.stage import Questions
from mismatch.stages.repair.before_after import few, probe_rows, shift_rows
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.forecast_readings import foretell
from mismatch.stages.repair.gates import standing, weighing
from mismatch.stages.repair.knockout import Knocked, knocked_out
from mismatch.stages.repair.ladder import Ladder, Texts
from mismatch.stages.repair.report.curve_figure import branch_line
from mismatch.stages.repair.report.forecast_words import forecast_lines
from mismatch.stages.repair.result import Repaired
from mismatch.stages.repair.rows import (
    AS_REPAIRED,
    AS_SWAPPED,
    branch_rows,
    rung_rows,
    student_rows,
)
from mismatch.stages.repair.rungs.rung import Rung
from mismatch.stages.repair.trainable import learner
from mismatch.stages.repair.trained_controls import SameSteps
from mismatch.stages.repair.training_text import learn_from
from mismatch.stages.reporting import write_html
from mismatch.stages.trace.batches import polite
from mismatch.stages.trace.stage import peak_memory, settings
from mismatch.surgery.operate import Student
from mismatch.surgery.students import Teacher, students_of
from mismatch.texts.windows import Windows

CHECKPOINT = "checkpoint"
"""The repaired model, inside the run folder."""


@dataclass(frozen=True)
class RepairTexts:
    """Held-out windows to judge and other ones to look at, of one source; windows of another to learn from.

    `asked` are the probes, `unasked` says which usual ones this model cannot be asked.
    """

    judged: Windows
    looked: Windows
    train: Windows
    text: Text
    asked: Questions | None = None
    unasked: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What a repair found: rungs, what the judge said of each student, branches, the forecast with its score, gates,
    further rows, seconds."""

    rungs: list[Rung]
    evaluated: dict[str, Evaluated]
    branches: list[Knocked]
    forecast: dict[str, Any]
    gates: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class RepairJob:
    """Everything one repair needs. `run()` does it.

    Args:
        config: the settings.
        teacher: the untouched model.
        texts: what to learn from and what to judge on.
        folder: the run folder; None writes nothing.
        progress: talk on stderr.
    """

    config: RepairConfig
    teacher: Teacher
    texts: RepairTexts
    folder: RunFolder | None = None
    progress: bool = False

    def run(self) -> Repaired:
        """Do the repair.

        Raises:
            KeyboardInterrupt: stopped between two steps; `.run_dir` is set when it can be resumed.
            MismatchError: what else can go wrong; the run folder then says `failed`.
        """
        try:
            # Without a run folder activations live as long as the run does.
            with polite() as stopping, tempfile.TemporaryDirectory(prefix="mismatch-") as temporary:
                return self._run(time.monotonic(), stopping, Path(temporary))
        except KeyboardInterrupt as stop:
            if self.folder is not None:
                self.folder.finish("interrupted")
                stop.run_dir = self.folder.path
            raise
        except Exception as error:
            if self.folder is not None:
                with suppress(RunError):
                    self.folder.finish("failed", error=str(error))
            raise

    def _run(self, started: float, stopping: Any, temporary: Path) -> Repaired:
        config, teacher = self.config, self.teacher
        swap, *controls = students_of(teacher, config, self.texts.text.calibration)
        mine = learner(teacher, config, swap, self.texts.text.calibration)
        student, parts = mine.student, mine.parts
        gates = {"weighs": weighing(parts), "start": standing(parts)}
        learnt = learn_from(
            config,
            teacher,
            self.texts.train,
            (self.texts.judged, self.texts.looked),
            state=None if self.folder is None else State(self.folder.path / "state" / "written"),
            stopping=stopping,
            say=self._say,
        )
        prints = {
            "settings": config.fingerprint(),
            "model": teacher.info.sha256,
            "train": learnt.windows.fingerprint,
            "judged": self.texts.judged.fingerprint,
            "looked": self.texts.looked.fingerprint,
        }
        device = teacher.layout.embedding_device
        self._say(f"the teacher runs over {self.texts.judged.tokens:,} held-out tokens, once")
        held_out = HeldOut(teacher.layout, self.texts.judged, parts[0].layer, config.batch_size)
        texts = Texts(
            [torch.from_numpy(b.ids).to(device) for b in learnt.windows.batches(config.batch_size)],
            [
                torch.from_numpy(b.ids).to(device)
                for b in self.texts.looked.batches(config.batch_size)
            ],
            {
                "model": teacher.info.sha256,
                "train": learnt.windows.fingerprint,
                "look": self.texts.looked.fingerprint,
            },
        )
        state = None if self.folder is None else State(self.folder.path / "state")
        shared = {
            "folder": self._activations(temporary),
            "fingerprint": prints,
            "stopping": stopping,
            "say": self._say,
            "spent": learnt.seconds,
        }
        beside = {control.name: held_out.evaluate(control.layout) for control in controls}
        ladder = Ladder(config, teacher.layout, mine, held_out, texts, state=state, **shared)
        ladder.begin()
        foretold = foretell(config, teacher, ladder, beside)
        for line in forecast_lines(asdict(foretold)):
            self._say(line)
        rungs = ladder.climb()
        self._say("branches are judged")
        for control in self._same_steps(swap):
            self._say(f"the control {control.name} is trained for the same steps")
            other = learner(teacher, config, control, self.texts.text.calibration)
            like = SameSteps(config, teacher.layout, other, held_out, texts, state=None, **shared)
            beside[f"{control.name}-same-steps"] = like.climb_like(rungs)
        evaluated = {AS_SWAPPED: ladder.swapped, AS_REPAIRED: ladder.best, **beside}
        knocked = knocked_out(held_out, student, parts, ladder.best, config.seed)
        for at in knocked:
            self._say(branch_line(vars(at), ladder.best.kl.mean().value))
        began = time.monotonic()
        rows = self._questions(swap, student)
        facts = {
            "prints": prints,
            "learnt": learnt.lines(config.calibration),
            "minutes": (time.monotonic() - started) / 60,
            "seconds_of_questions": time.monotonic() - began,
        }
        gates["end"] = standing(parts)
        said = foretold.scored(rungs)
        return self._finish(student, Outcome(rungs, evaluated, knocked, said, gates, rows, facts))

    def _same_steps(self, swap: Student) -> list[Student]:
        """The controls that are trained like the swap."""
        named = replace(self.config, controls=self.config.same_steps)
        return students_of(self.teacher, named, self.texts.text.calibration, swap)[1:]

    def _questions(self, swap: Student, repaired: Student) -> list[dict[str, Any]]:
        """Shift of both at every site, and the probes."""
        config, rows = self.config, []
        if config.traced:
            cut = few(self.texts.judged, config.traced)
            self._say(f"swap and repaired model are traced on {cut.tokens:,} held-out tokens")
            rows += shift_rows(
                self.teacher, swap, repaired, cut, batch_size=config.batch_size, seed=config.seed
            )
        if self.texts.asked is not None:
            self._say(f"probes: {', '.join(self.texts.asked.probes)}")
            rows += probe_rows(self.texts.asked, self.teacher, swap, repaired)
        for line in self.texts.unasked:
            self._say(line)
        return rows

    def _activations(self, temporary: Path) -> Path:
        if self.config.store is not None:
            return Path(self.config.store)
        return temporary if self.folder is None else self.folder.path / "state" / "activations"

    def _say(self, line: str) -> None:
        if self.progress:
            print(line, file=sys.stderr, flush=True)
        if self.folder is not None:
            self.folder.log(line)

    # ---- results --------------------------------------------------------------------------------

    def _finish(self, student: Student, outcome: Outcome) -> Repaired:
        config, cut, evaluated = self.config, self.texts.judged, outcome.evaluated
        plan = plan_dict(student.plan, plan_warnings(student.plan, cut.seq_len))
        climbed = {
            "rungs": [asdict(rung) for rung in outcome.rungs],
            "forecast": outcome.forecast,
            "branches": [asdict(at) for at in outcome.branches],
            "gates": outcome.gates,
            "notes": [*outcome.facts["learnt"], *self.texts.unasked],
            "students": {
                name: {
                    "kl": found.kl.mean(config.seed)[:3],
                    "nll": found.nll.mean(config.seed)[:3],
                    "gap_closed": found.kl.gap_closed(evaluated[AS_SWAPPED].kl, config.seed)[:3],
                    "repaired_minus": (evaluated[AS_REPAIRED].kl - found.kl).mean(config.seed)[:3],
                }
                for name, found in evaluated.items()
            },
            "teacher": self.teacher.info.as_dict(),
        }
        plan["climb"] = climbed
        about = {
            "kind": "repair",
            "model_info": self.teacher.info.as_dict(),
            "dtype": str(self.teacher.model.dtype).removeprefix("torch."),
            "device": str(self.teacher.layout.embedding_device),
            "seed": config.seed,
            "text": {
                "source": self.texts.text.held_out.source,
                "note": self.texts.text.held_out.note,
                "documents": cut.n_docs,
                "windows": len(cut),
                "tokens": cut.tokens,
                "fingerprint": cut.fingerprint,
            },
            "fingerprints": outcome.facts["prints"],
            "minutes": round(outcome.facts["minutes"], 2),
            "seconds_of_questions": round(outcome.facts["seconds_of_questions"], 1),
            "peak_memory_bytes": peak_memory(),
        }
        rows = [
            *rung_rows(outcome.rungs, cut.tokens),
            *student_rows(evaluated, config.seed),
            *branch_rows(outcome.branches, cut.tokens),
            *outcome.rows,
        ]
        if self.folder is None:
            name = run_id(config.model, spec.format(config.swap_spec), settings(config))
            frame = table.as_table([row | {"run_id": name} for row in rows])
            run = Run.in_memory(
                frame, {"run_id": name, "status": "done", **about}, plan, settings(config)
            )
            return Repaired(run, climbed, student)
        folder = self.folder
        folder.write_plan(plan)
        folder.write_table(rows)
        student.save(folder.path / CHECKPOINT, extra={"repair": climbed}, overwrite=True)
        folder.finish("done", **about)
        write_html(folder.path)
        return Repaired(load_run(folder.path), climbed, student)
