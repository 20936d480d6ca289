"""One diagnosis as a job: fit on calibration text, judge on held-out text, then words, table, picture, report.

It takes minutes, so it is not resumed; an interrupted run says so in its folder.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from tqdm import tqdm

from mismatch import spec
from mismatch.errors import NumericsError, RunError
from mismatch.forward.heldout import Evaluated, Trial
from mismatch.runs import table
from mismatch.runs.folder import Run, RunFolder, load_run, run_id
from mismatch.stages.checking import Text, plan_dict, plan_warnings
from mismatch.stages.diagnose.config import DiagnoseConfig
from mismatch.stages.diagnose.corrections import SUBSETS
from mismatch.stages.diagnose.fitted import TakenApart, joint_name
from mismatch.stages.diagnose.heldout import CorrectedHeldOut
from mismatch.stages.diagnose.numbers import Found, Kl, Returned, Share
from mismatch.stages.diagnose.places import places_of
from mismatch.stages.diagnose.result import Diagnosed
from mismatch.stages.diagnose.rows import rows_of
from mismatch.stages.diagnose.shapley import causes_of, kl_of, leading, share_of
from mismatch.stages.diagnose.verdict import headline, verdicts
from mismatch.stages.repair.config import RUNGS
from mismatch.stages.repair.forecast import Foretold, Swap, foretell
from mismatch.stages.reporting import write_html
from mismatch.stages.trace.stage import peak_memory, settings
from mismatch.surgery.operate import Student
from mismatch.surgery.students import Teacher, students_of
from mismatch.texts.windows import Windows

NOTHING = 1e-6
"""Nats: a KL at or below this comes from rounding (another kernel brings up to 5e-7)."""
FEW = 8
"""With fewer documents the intervals are too narrow."""


READ_HERE = (
    "read on calibration text without first and massive tokens, not as a repair reads it: the interval was not tried "
    "for that; mismatch repair forecasts anew"
)


@dataclass(frozen=True)
class Texts:
    """Held-out windows, windows to fit on, and where both come from."""

    judged: Windows
    fitted: Windows
    text: Text


@dataclass
class DiagnoseJob:
    """Everything one diagnosis needs. `run()` does it.

    Args:
        config: the settings.
        teacher: the untouched model.
        texts: to fit on, and to judge on.
        student: a student that is there already; None swaps as the config says.
        evidence: readings of an earlier run.
        folder: the run folder; None writes nothing.
        progress: a bar on stderr.
    """

    config: DiagnoseConfig
    teacher: Teacher
    texts: Texts
    student: Student | None = None
    evidence: tuple[dict[str, Any], ...] = ()
    folder: RunFolder | None = None
    progress: bool = False

    def run(self) -> Diagnosed:
        """Do it.

        Raises:
            MismatchError: what goes wrong; the run folder then says `failed`.
            KeyboardInterrupt: stopped; the run folder then says `interrupted`.
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

    def _run(self, started: float) -> Diagnosed:
        config, teacher = self.config, self.teacher
        swap, *controls = students_of(teacher, config, self.texts.text.calibration, self.student)
        places = places_of(swap.plan)
        with self._bar() as bar:
            apart = TakenApart(teacher, swap, places, config, self.texts.fitted)
            bar.set_description("the teacher, on held-out text")
            held_out = CorrectedHeldOut(
                teacher.layout,
                places,
                self.texts.judged,
                batch_size=config.batch_size,
                scored=config.scored,
                seed=config.seed,
                student=swap.layout,
                complete=apart.complete,
                progress=bar.update,
            )
            bar.set_description("the swap and its controls")
            first = [Trial(s.name, s.layout) for s in (swap, *controls)]
            bar.total = len(held_out.batches) * (1 + len(first))
            evaluated = held_out.evaluate_all(first)
            damage = evaluated[swap.name]
            if not math.isfinite(damage.kl.total):
                raise NumericsError(
                    "the KL of the swap is not a number: its activations are not finite",
                    hint="mismatch trace shows where they leave",
                )
            if kl_of(damage, config.seed).value > NOTHING:
                bar.set_description("fits on calibration text")
                apart.fit()
                bar.set_description("corrections")
                trials = apart.trials(held_out.sides)
                bar.total += len(held_out.batches) * len(trials)
                bar.refresh()
                evaluated |= held_out.evaluate_all(trials)
        found = self._found(swap, evaluated, apart, held_out)
        return self._finish(found, swap, time.monotonic() - started)

    @contextmanager
    def _bar(self) -> Iterator[tqdm]:
        bar = tqdm(file=sys.stderr, unit="batch", disable=None if self.progress else True)
        with bar:
            yield bar

    def _found(
        self,
        swap: Student,
        evaluated: dict[str, Evaluated],
        apart: TakenApart,
        held_out: CorrectedHeldOut,
    ) -> Found:
        """Shares, causes, places: from sums to numbers."""
        seed, damage = self.config.seed, evaluated[swap.name]
        behind = {
            "layers": list(held_out.behind.layers),
            "errors": list(held_out.behind.errors),
            "growth": held_out.behind.errors[-1] / held_out.behind.errors[0]
            if held_out.behind.errors[0] > 0
            else math.nan,
        }
        shared = {
            "swap": spec.format(self.config.swap_spec),
            "damage": kl_of(damage, seed),
            "nll": Share(*damage.nll.mean(seed)[:3]),
            "controls": {name: kl_of(evaluated[name], seed) for name in self.config.controls},
            "behind": behind,
            "evidence": self.evidence,
        }
        if apart.fitted is None:
            return Found(**shared)
        none = (Share(0.0, 0.0, 0.0), Kl(**vars(shared["damage"])))
        returned = []
        for one in apart.asked:
            share, kl = none
            after = evaluated.get(apart.trial_of(one.trial))
            if after is not None:
                share, kl = share_of(after, damage, seed), kl_of(after, seed)
            returned.append(
                Returned(one.name, one.group, share, kl, one.layer, one.head, after is None)
            )
        joint = {
            chosen: evaluated.get(apart.trial_of(joint_name(chosen)), damage) for chosen in SUBSETS
        }
        causes, unexplained = causes_of(joint, damage, seed)
        return Found(
            **shared,
            returned=tuple(returned),
            causes=causes,
            joint={"+".join(c): share_of(j, damage, seed) for c, j in joint.items()},
            unexplained=unexplained,
            leading=leading(returned),
            places=tuple(apart.facts(held_out.batches, held_out.sides)),
            not_applicable=tuple(apart.not_applicable),
        )

    def _foretold(self, found: Found, swap: Student) -> Foretold:
        """What a repair would close, as read here."""
        place, zero = found.places[0], found.controls.get("zero")
        local, mapped = place["forced_error"], place["linear_error"]
        numbers = {
            "local_error": local,
            "mapped_error": mapped,
            "removed": max(0.0, 1 - mapped / local) if local > 0 else math.nan,
        }
        if zero is not None and zero.value > 0:
            numbers["of_zero"] = found.damage.value / zero.value
        layout, clauses = self.teacher.layout, swap.plan.clauses
        told = foretell(
            Swap(
                found.swap.partition(":")[2],
                clauses[0].slot,
                len({clause.path for clause in clauses}),
                layout.n_layers,
                layout.d_model,
                numbers,
            ),
            RUNGS,
            None,
        )
        return replace(told, note=READ_HERE) if told.rungs else told

    def _finish(self, found: Found, swap: Student, seconds: float) -> Diagnosed:
        config, cut, learnt = self.config, self.texts.judged, self.texts.fitted
        warned = list(plan_warnings(swap.plan, cut.seq_len))
        if cut.n_docs < FEW:
            warned.append(
                f"{cut.n_docs} held-out documents: intervals over so few are too narrow; take --judged "
                f"{FEW * cut.seq_len} or more, or text of more documents"
            )
        plan = plan_dict(swap.plan, warned)
        plan |= {"diagnosis": found.as_dict(), "verdict": headline(found)}
        if found.places:
            plan["forecast"] = asdict(self._foretold(found, swap))
        findings = verdicts(found, config, plan["clauses"])
        facts = {
            "kind": "diagnose",
            "model_info": self.teacher.info.as_dict(),
            "dtype": str(self.teacher.model.dtype).removeprefix("torch."),
            "device": str(self.teacher.layout.embedding_device),
            "attention": self.teacher.model.config._attn_implementation,
            "seed": config.seed,
            "text": _about(cut, self.texts.text.held_out),
            "fitted_on": _about(learnt, self.texts.text.calibration),
            "seconds": round(seconds, 1),
            "peak_memory_bytes": peak_memory(),
        }
        rows = rows_of(found)
        if self.folder is None:
            name = run_id(config.model, found.swap, settings(config))
            frame = table.as_table([row | {"run_id": name} for row in rows])
            about = {"run_id": name, "status": "done", "model": config.model, **facts}
            run = Run.in_memory(frame, about, plan, settings(config))
            return Diagnosed(run, found, findings)
        folder = self.folder
        folder.write_plan(plan)
        folder.write_table(rows)
        folder.write_findings([finding.as_dict() for finding in findings])
        folder.finish("done", **facts)
        write_html(folder.path)
        folder.log("done")
        return Diagnosed(load_run(folder.path), found, findings)


def _about(cut: Windows, documents: Any) -> dict[str, Any]:
    return {
        "source": documents.source,
        "note": documents.note,
        "documents": cut.n_docs,
        "windows": len(cut),
        "tokens": cut.tokens,
        "fingerprint": cut.fingerprint,
    }
