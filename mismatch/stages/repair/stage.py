"""`mismatch repair`: swap, train the swapped module to match the teacher layer by layer, prove what was recovered.

The swap stays as it was, beside a second student over the same teacher that trains: at the end both are evaluated,
probed and traced against one teacher, on the same evaluation tokens.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mismatch import spec
from mismatch.forward.heldout import Evaluated, HeldOut
from mismatch.runs.plan import as_json
from mismatch.runs.ranks import RankGone
from mismatch.runs.stopping import polite
from mismatch.stages.base import Outcome, Stage
from mismatch.stages.offloading import refuse_offloaded
from mismatch.stages.opening import Opened
from mismatch.stages.probe.questions import Questions
from mismatch.stages.repair import before_after
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.gates import standing, weighing
from mismatch.stages.repair.judge import Judge, Selection, selection
from mismatch.stages.repair.knockout import knocked_out
from mismatch.stages.repair.ladder import Ladder, Texts
from mismatch.stages.repair.ladder_stages.module_pair import pairs_of
from mismatch.stages.repair.ladder_stages.slot_counts import check_budget, keepers
from mismatch.stages.repair.plan import Gates, RepairPlan, StudentReading
from mismatch.stages.repair.report.curve_figure import branch_line
from mismatch.stages.repair.result import CHECKPOINT, Repaired
from mismatch.stages.repair.rows import (
    AS_REPAIRED,
    AS_SWAPPED,
    branch_rows,
    stage_rows,
    student_rows,
)
from mismatch.stages.repair.texts import RepairTexts, read_texts
from mismatch.stages.repair.trainable import Trainable, trainable
from mismatch.stages.repair.trained_controls import TrainedControl
from mismatch.stages.repair.training_text import readable, reading_pace, training_text
from mismatch.stages.swapped import calibration_tokens, reach, warned
from mismatch.surgery.operate import Student
from mismatch.surgery.students import students_of
from mismatch.texts.windows import Windows


@dataclass(frozen=True)
class Prepared:
    """Texts in their roles; windows to calibrate on (None: nothing does); probes before and after (None: none); which
    usual probes are not asked, with the reason; prompts that the ladder is judged on."""

    texts: RepairTexts
    calibration: Windows | None
    asked: Questions | None
    unasked: tuple[str, ...]
    selection: Selection


WHOLE = "a repair trains beside them and writes all of them into its checkpoint"
"""Why no weight may be offloaded."""


class Repair(Stage[RepairConfig, Prepared]):
    help = "Train the swapped module to match the teacher's, layer by layer, and evaluate what was recovered."
    Config = RepairConfig
    Result = Repaired
    examples = (
        'mismatch repair --model smollm2 --swap "layer12:infini(segment=64)"',
        "mismatch repair runs/TRACE --stages closed-form,local --train-tokens 1M --max-minutes 10",
    )
    report = "mismatch.stages.repair.report.page"
    plan = "mismatch.stages.repair.plan:RepairPlan"
    resumable = True
    distributed = True
    starts_from = ("trace",)
    takes = (
        "model",
        "revision",
        "dtype",
        "swap",
        "student",
        "data",
        "text_field",
        "selected_by",
        "allow_overlap",
        "answers_only",
        "seed",
        "seq_len",
    )

    def prepare(self, opened: Opened[RepairConfig]) -> Prepared:
        refuse_offloaded(opened, WHOLE)
        swap, *_ = opened.planned()  # refuses what model, swap and controls do not allow
        parts = pairs_of(opened.skeleton, swap)
        if opened.config.state_bytes is not None:
            check_budget(keepers(parts), opened.config.state_bytes)
        if opened.config.trained_controls:
            opened.child(_with_trained_controls(opened.config)).planned()
        texts = read_texts(opened)
        asked, unasked = before_after.asked(opened, texts)
        controls = (*opened.config.controls, *opened.config.trained_controls)
        clauses = () if opened.has_student else spec.check(opened.config.swap_spec).clauses
        calls = [clause.call for clause in clauses]
        wanted = calibration_tokens(calls, controls, d_model=opened.skeleton.d_model)
        calibration = opened.calibration(wanted, texts.documents)
        judged_on = selection(opened, texts.validation, reach(swap.plan.clauses))
        return Prepared(texts, calibration, asked, tuple(unasked), judged_on)

    def announce(self, opened: Opened[RepairConfig], prepared: Prepared) -> str:
        config, texts = opened.config, prepared.texts
        generated = (
            f" and {config.to_generate:,} sampled from the teacher" if config.to_generate else ""
        )
        return (
            f"train on {texts.train.tokens:,} tokens of {config.train_data}{generated}, evaluate on "
            f"{texts.evaluation.tokens:,} of {config.data}, validate on {texts.validation.tokens:,} others of it"
        )

    def loaded(self, opened: Opened[RepairConfig], prepared: Prepared) -> None:
        refuse_offloaded(opened, WHOLE)

    def run(self, opened: Opened[RepairConfig], prepared: Prepared) -> Outcome | None:
        # Without a run folder activations live as long as the run does.
        with polite() as stopping, tempfile.TemporaryDirectory(prefix="mismatch-") as temporary:
            try:
                return _run(opened, prepared, stopping, Path(temporary))
            except RankGone:
                if stopping():  # so were the others, and one of them has stopped
                    raise KeyboardInterrupt from None
                raise


def _run(
    opened: Opened[RepairConfig], prepared: Prepared, stopping: Any, temporary: Path
) -> Outcome | None:
    config, teacher, texts, ranks = opened.config, opened.teacher, prepared.texts, opened.ranks
    calibration = prepared.calibration
    swap, *controls = opened.students(calibration)
    mine = trainable(teacher.layout, config, swap)
    student, parts = mine.student, mine.parts
    ranks.copied(mine.named().values())
    start = standing(parts)
    _say_who_waits(opened, len(parts))
    pace = reading_pace(
        config,
        teacher,
        texts.train,
        blocks=parts[-1].layer + 1 + config.window_blocks * ("window" in config.stages),
        state=opened.state("reading"),
        ranks=ranks,
    )
    trained_on = training_text(
        config,
        teacher,
        texts.train,
        (texts.evaluation, texts.validation),
        reading=pace,
        state=opened.state("self-generated"),
        stopping=stopping,
        say=opened.say,
        ranks=ranks,
    )
    trained_on = readable(config, trained_on, pace, say=opened.say)
    device = teacher.layout.embedding_device
    opened.say(f"the teacher runs over {texts.evaluation.tokens:,} evaluation tokens, once")
    first = swap.plan.first or 0

    def held(config: RepairConfig) -> tuple[HeldOut, dict[str, Evaluated]]:
        made = HeldOut(teacher.layout, texts.evaluation, first, config.batch_size, ranks=ranks)
        return made, {control.name: made.evaluate(control.layout) for control in controls}

    held_out, beside = opened.fitting(held, "on evaluation text")
    key = {"model": teacher.info.sha256, "train": trained_on.windows.fingerprint}
    batches = Texts(
        _batches(trained_on.windows, config.batch_size, device),
        _batches(texts.validation, config.batch_size, device),
        {**key, "validation": texts.validation.fingerprint},
    )
    prints = {**opened.fingerprints(), "training": trained_on.windows.fingerprint}
    shared: dict[str, Any] = {
        "folder": _activations(opened, temporary),
        "fingerprint": prints,
        "stopping": stopping,
        "say": opened.say,
        "spent": trained_on.seconds,
        "ranks": ranks,
    }
    judge = Judge(held_out, prepared.selection)
    opened.say(judge.note)
    ladder = Ladder(config, teacher.layout, mine, judge, batches, state=opened.state(), **shared)
    ladder.begin()
    stages = ladder.run()
    opened.say("branches are evaluated")
    for control in _trained_controls(opened, swap, calibration):
        opened.say(f"the control {control.name} is trained for the same steps")
        other = trainable(teacher.layout, config, control)
        like = TrainedControl(config, teacher.layout, other, judge, batches, state=None, **shared)
        beside[f"{control.name}-trained"] = like.run_like(stages)
    evaluated = {AS_SWAPPED: ladder.swapped, AS_REPAIRED: ladder.best, **beside}
    branches = knocked_out(held_out, student, parts, ladder.best)
    for at in branches:
        opened.say(branch_line(at, ladder.best.kl.mean().value))
    began = time.monotonic()
    rows = _before_and_after(opened, prepared, swap, mine)
    if not ranks.first:
        return None
    base = warned(student.plan, texts.evaluation.seq_len)
    over = ladder.best.kl.mean().over
    plan = RepairPlan(
        spec=base.spec,
        clauses=base.clauses,
        warnings=base.warnings,
        apart=base.apart,
        stages=tuple(stages),
        students=_readings(evaluated),
        branches=tuple(branches),
        gates=Gates(weighing(parts), start, standing(parts)),
        notes=(
            *trained_on.lines(config.train_data),
            *texts.notes,
            judge.note,
            *prepared.unasked,
        ),
        teacher=teacher.info.as_dict(),
        over=over,
    )
    if opened.folder is not None:
        extra = {"repair": as_json(plan)}
        student.save(opened.folder.path / CHECKPOINT, extra=extra, overwrite=True)
    tokens = texts.evaluation.tokens
    return Outcome(
        [
            *stage_rows(stages, tokens, over),
            *student_rows(evaluated),
            *branch_rows(branches, tokens, over),
            *rows,
        ],
        plan,
        {"fingerprints": prints},  # with the self-generated text among the training text
        seconds={"before and after": time.monotonic() - began},
        memory={"student": student},
    )


def _say_who_waits(opened: Opened[RepairConfig], modules: int) -> None:
    """Where a step has fewer windows than there are ranks: some of them wait."""
    config, world = opened.config, opened.ranks.world
    by_rows = {"window", "end-to-end"}
    if config.order == "sequential" or modules == 1:
        by_rows |= {"local", "block"}
    waiting = [name for name in config.stages if name in by_rows]
    if waiting and config.batch_size < world:
        opened.say(
            f"--batch-size {config.batch_size}: {world - config.batch_size} of {world} ranks wait in the steps of "
            f"{', '.join(waiting)}; a larger one would share them, and is another training"
        )


def _readings(evaluated: Mapping[str, Evaluated]) -> dict[str, StudentReading]:
    swapped, repaired = evaluated[AS_SWAPPED].kl, evaluated[AS_REPAIRED].kl
    return {
        name: StudentReading(
            one.kl.mean()[:3],
            one.nll.mean()[:3],
            one.kl.gap_closed(swapped)[:3],
            (repaired - one.kl).mean()[:3],
            repaired.gap_closed(one.kl)[:3],
        )
        for name, one in evaluated.items()
    }


def _batches(cut: Windows, size: int, device: torch.device) -> list[torch.Tensor]:
    return [torch.from_numpy(batch.ids).to(device) for batch in cut.batches(size)]


def _trained_controls(
    opened: Opened[RepairConfig], swap: Student, calibration: Any
) -> list[Student]:
    """The controls that are trained like the swap."""
    named = _with_trained_controls(opened.config)
    return students_of(opened.teacher, named, calibration, swap)[1:]


def _with_trained_controls(config: RepairConfig) -> RepairConfig:
    """The settings with the controls that are trained in place of those that are only measured."""
    return replace(config, controls=config.trained_controls)


def _before_and_after(
    opened: Opened[RepairConfig], prepared: Prepared, swap: Student, learner: Trainable
) -> list[dict[str, Any]]:
    """Shift of both at every site, and the probes."""
    config, repaired, rows = opened.config, learner.student, []
    if config.trace_tokens:
        cut = before_after.few(prepared.texts.evaluation, config.trace_tokens)
        opened.say(f"swap and repaired model are traced on {cut.tokens:,} evaluation tokens")
        rows += opened.fitting(
            lambda config: before_after.shift_rows(
                opened.teacher,
                swap,
                repaired,
                cut,
                batch_size=config.batch_size,
                seed=config.seed,
                ranks=opened.ranks,
            ),
            "in the trace behind the repair",
        )
    if prepared.asked is not None:
        opened.say(f"probes: {', '.join(prepared.asked.probes)}")
        rows += before_after.probe_rows(
            prepared.asked, opened.teacher, swap, repaired, learner.parts
        )
    for line in prepared.unasked:
        opened.say(line)
    return rows


def _activations(opened: Opened[RepairConfig], temporary: Path) -> Path:
    if opened.config.activations_dir is not None:
        return Path(opened.config.activations_dir)
    path = temporary if opened.path is None else opened.path / "state" / "activations"
    return opened.ranks.from_first(path)
