"""One repair as a job: texts, student and its own tensors, the ladder, controls, then curve, table, checkpoint."""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
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
from mismatch.repairing.branches import bypassed
from mismatch.repairing.config import RepairConfig
from mismatch.repairing.judge import Judge, Judged
from mismatch.repairing.ladder import Ladder, Texts
from mismatch.repairing.part import own, parts_of
from mismatch.repairing.result import Repaired
from mismatch.repairing.rung import Rung
from mismatch.report.html import write_html
from mismatch.run import Run, RunFolder, load_run, run_id
from mismatch.state import State
from mismatch.surgery import Student
from mismatch.windows import Windows

CHECKPOINT = "checkpoint"
"""The repaired model, inside the run folder."""


@dataclass(frozen=True)
class RepairTexts:
    """Held-out windows to judge and other ones to look at, of one source; windows of another to learn from."""

    judged: Windows
    looked: Windows
    train: Windows
    text: Text


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
        parts = parts_of(teacher.layout, swap)
        student = self._with_neighbours(swap, parts[-1].layer)
        parts = parts_of(teacher.layout, swap) if student is swap else _moved(parts, student)
        for part in parts:
            own(part.student, teacher.model)
        companions = self._companions(student, parts)
        trained = _neighbour_parameters(student, parts)
        prints = {
            "settings": config.fingerprint(),
            "model": teacher.info.sha256,
            "train": self.texts.train.fingerprint,
            "judged": self.texts.judged.fingerprint,
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
        judged = {"swap": ladder.swapped, "repaired": ladder.best, **beside}
        notes = bypassed(judge, student, parts, ladder.best)
        for note in notes:
            self._say(note)
        facts = {"prints": prints, "minutes": (time.monotonic() - started) / 60}
        return self._finish(student, rungs, judged, notes, facts)

    # ---- parts ----------------------------------------------------------------------------------

    def _with_neighbours(self, swap: Student, last: int) -> Student:
        """The same swap with LoRA in the blocks behind it: at the start it changes nothing."""
        config, teacher = self.config, self.teacher
        end = min(last + config.neighbours, teacher.layout.n_layers - 1)
        if not config.behind or end == last:
            return swap
        lora = f"lora(r={config.rank}, alpha={float(config.rank)}, targets=all)"
        text = [
            spec.format(config.swap_spec),
            *(f"layers{last + 1}-{end}.{slot}:{lora}" for slot in ("attn", "mlp")),
        ]
        return calibrated_swap(
            teacher,
            spec.parse(text),
            calibration=self.texts.text.calibration,
            tokens=config.calibration_tokens,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
        )

    def _companions(
        self, student: Student, parts: Any
    ) -> dict[int, dict[str, nn.Parameter]]:
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

    def _finish(
        self,
        student: Student,
        rungs: list[Rung],
        judged: dict[str, Judged],
        notes: list[str],
        facts: dict[str, Any],
    ) -> Repaired:
        config, cut = self.config, self.texts.judged
        plan = plan_dict(student.plan, plan_warnings(student.plan, cut.seq_len))
        climbed = {
            "rungs": [asdict(rung) for rung in rungs],
            "notes": notes,
            "students": {
                name: {
                    "kl": found.mean_kl(config.seed)[:3],
                    "nll": found.mean_nll(config.seed)[:3],
                    "gap_closed": found.gap_closed(judged["swap"], config.seed),
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
            "fingerprints": facts["prints"],
            "minutes": round(facts["minutes"], 2),
            "peak_memory_bytes": peak_memory(),
        }
        rows = [*_rows(rungs), *_student_rows(judged, config.seed)]
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


def _moved(parts: Any, student: Student) -> Any:
    """The same places in another tree."""
    return tuple(replace(p, student=student.model.get_submodule(p.path)) for p in parts)


def _neighbour_parameters(student: Student, parts: Any) -> dict[str, nn.Parameter]:
    """What LoRA added behind the parts, by name."""
    own_paths = {part.path for part in parts}
    return {
        f"{clause.path}.{name}": student.model.get_submodule(clause.path).get_parameter(name)
        for clause in student.plan.clauses
        if clause.path not in own_paths
        for name in clause.new_parameters
    }


def _rows(rungs: list[Rung]) -> list[dict[str, Any]]:
    return [
        {
            "stage": "repair",
            "step": number,
            "mode": "free",
            "student": "swap",
            "site": "logits",
            "metric": "kl",
            "stat": f"mean[rung={rung.name}]",
            "value": rung.kl,
            "lo": rung.lo,
            "hi": rung.hi,
            "n": 0,
            "swapped": False,
        }
        for number, rung in enumerate(rungs)
    ]


def _student_rows(judged: dict[str, Judged], seed: int) -> list[dict[str, Any]]:
    rows = []
    for name, found in judged.items():
        for metric, stat, (value, lo, hi, n) in (
            ("kl", "mean", found.mean_kl(seed)),
            ("nll", "shift", found.mean_nll(seed)),
        ):
            rows.append(
                {
                    "stage": "repair" if name == "repaired" else "surgery",
                    "step": 0,
                    "mode": "free",
                    "student": "swap" if name == "repaired" else name,
                    "site": "logits",
                    "metric": metric,
                    "stat": stat,
                    "value": value,
                    "lo": lo,
                    "hi": hi,
                    "n": n,
                }
            )
    return rows
