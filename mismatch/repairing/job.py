"""One repair as a job: texts, student and its own tensors, the ladder, what is asked beside it, then table and report.

The swap stays as it was, beside a second student over the same teacher that learns: at the end both are judged, probed
and traced against one teacher, on the same held-out tokens.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mismatch import spec, table
from mismatch.checking import Text, plan_dict, plan_warnings
from mismatch.errors import RunError
from mismatch.job import peak_memory, settings
from mismatch.loop import polite
from mismatch.operating import Teacher, calibrated_swap, students_of
from mismatch.probing import Questions
from mismatch.repairing import questions
from mismatch.repairing.branches import Knocked, knocked_out
from mismatch.repairing.config import RepairConfig
from mismatch.repairing.judge import Judge, Judged
from mismatch.repairing.ladder import Ladder, Texts
from mismatch.repairing.part import Part, own, parts_of
from mismatch.repairing.result import Repaired
from mismatch.repairing.rows import AS_REPAIRED, AS_SWAPPED, branch_rows, rung_rows, student_rows
from mismatch.repairing.rung import Rung
from mismatch.report.html import write_html
from mismatch.report.repair import branch_line
from mismatch.run import Run, RunFolder, load_run, run_id
from mismatch.state import State
from mismatch.surgery import Student
from mismatch.windows import Windows

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
    """What a repair found: the rungs, what the judge said of each student, branches, further rows, seconds."""

    rungs: list[Rung]
    judged: dict[str, Judged]
    branches: list[Knocked]
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
        last = parts_of(teacher.layout, swap)[-1].layer
        student = self._learner(last)
        parts = _of_the_swap(parts_of(teacher.layout, student), swap)
        for part in parts:
            own(part.student, teacher.model)
        companions = self._companions(student, parts)
        trained = _neighbour_parameters(student, parts)
        prints = {
            "settings": config.fingerprint(),
            "model": teacher.info.sha256,
            "train": self.texts.train.fingerprint,
            "judged": self.texts.judged.fingerprint,
            "looked": self.texts.looked.fingerprint,
        }
        device = teacher.layout.embedding_device
        self._say(f"the teacher runs over {self.texts.judged.tokens:,} held-out tokens, once")
        judge = Judge(teacher.layout, self.texts.judged, parts[0].layer, config.batch_size)
        texts = Texts(
            [
                torch.from_numpy(b.ids).to(device)
                for b in self.texts.train.batches(config.batch_size)
            ],
            [
                torch.from_numpy(b.ids).to(device)
                for b in self.texts.looked.batches(config.batch_size)
            ],
            {
                "model": teacher.info.sha256,
                "train": self.texts.train.fingerprint,
                "look": self.texts.looked.fingerprint,
            },
        )
        state = None if self.folder is None else State(self.folder.path / "state")
        ladder = Ladder(
            config,
            teacher.layout,
            student,
            parts,
            companions,
            trained,
            judge,
            texts,
            folder=self._activations(temporary),
            state=state,
            fingerprint=prints,
            stopping=stopping,
            say=self._say,
        )
        rungs = ladder.climb()
        self._say("controls and branches are judged")
        beside = {control.name: judge.judge(control.layout) for control in controls}
        judged = {AS_SWAPPED: ladder.swapped, AS_REPAIRED: ladder.best, **beside}
        knocked = knocked_out(judge, student, parts, ladder.best, config.seed)
        for at in knocked:
            self._say(branch_line(vars(at), ladder.best.mean_kl()[0]))
        began = time.monotonic()
        rows = self._questions(swap, student)
        facts = {
            "prints": prints,
            "minutes": (time.monotonic() - started) / 60,
            "seconds_of_questions": time.monotonic() - began,
        }
        return self._finish(student, Outcome(rungs, judged, knocked, rows, facts))

    def _questions(self, swap: Student, repaired: Student) -> list[dict[str, Any]]:
        """Shift of both at every site, and the probes."""
        config, rows = self.config, []
        if config.traced:
            cut = questions.few(self.texts.judged, config.traced)
            self._say(f"swap and repaired model are traced on {cut.tokens:,} held-out tokens")
            rows += questions.shift_rows(
                self.teacher, swap, repaired, cut, batch_size=config.batch_size, seed=config.seed
            )
        if self.texts.asked is not None:
            self._say(f"probes: {', '.join(self.texts.asked.probes)}")
            rows += questions.probe_rows(self.texts.asked, self.teacher, swap, repaired)
        for line in self.texts.unasked:
            self._say(line)
        return rows

    # ---- parts ----------------------------------------------------------------------------------

    def _learner(self, last: int) -> Student:
        """The same swap once more, to learn; with LoRA in the blocks behind it, which at the start changes nothing."""
        config, teacher = self.config, self.teacher
        text = [spec.format(config.swap_spec)]
        end = min(last + config.neighbours, teacher.layout.n_layers - 1)
        if config.behind and end > last:
            lora = f"lora(r={config.rank}, alpha={float(config.rank)}, targets=all)"
            text += [f"layers{last + 1}-{end}.{slot}:{lora}" for slot in ("attn", "mlp")]
        return calibrated_swap(
            teacher,
            spec.parse(text),
            calibration=self.texts.text.calibration,
            tokens=config.calibration_tokens,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
        )

    def _companions(self, student: Student, parts: Any) -> dict[int, dict[str, nn.Parameter]]:
        """The matrices of each swapped block outside of its parts, as its own copies, by layer and name."""
        found: dict[int, dict[str, nn.Parameter]] = {}
        if not self.config.around:
            return found
        inside = tuple(f"{part.path}." for part in parts)
        for layer in dict.fromkeys(part.layer for part in parts):
            path = student.layout.slot_path(layer, "block")
            block = student.model.get_submodule(path)
            own(block, self.teacher.model)
            found[layer] = {
                name: parameter
                for inner, parameter in block.named_parameters()
                if parameter.ndim > 1
                and parameter.is_floating_point()
                and not (name := f"{path}.{inner}").startswith(inside)
            }
        return found

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
        config, cut, judged = self.config, self.texts.judged, outcome.judged
        plan = plan_dict(student.plan, plan_warnings(student.plan, cut.seq_len))
        climbed = {
            "rungs": [asdict(rung) for rung in outcome.rungs],
            "branches": [asdict(at) for at in outcome.branches],
            "notes": list(self.texts.unasked),
            "students": {
                name: {
                    "kl": found.mean_kl(config.seed)[:3],
                    "nll": found.mean_nll(config.seed)[:3],
                    "gap_closed": found.gap_closed(judged[AS_SWAPPED], config.seed),
                    "repaired_minus": judged[AS_REPAIRED].more_than(found, config.seed),
                }
                for name, found in judged.items()
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
            *student_rows(judged, config.seed),
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


def _of_the_swap(parts: tuple[Part, ...], swap: Student) -> tuple[Part, ...]:
    """Those of the parts that were swapped; the others hold LoRA alone."""
    swapped = {clause.path for clause in swap.plan.clauses}
    return tuple(part for part in parts if part.path in swapped)


def _neighbour_parameters(student: Student, parts: Any) -> dict[str, nn.Parameter]:
    """What LoRA added behind the parts, by name."""
    own_paths = {part.path for part in parts}
    return {
        f"{clause.path}.{name}": student.model.get_submodule(clause.path).get_parameter(name)
        for clause in student.plan.clauses
        if clause.path not in own_paths
        for name in clause.new_parameters
    }
