"""What is asked of teacher, swap and repaired model beside the KL: the shift at every site, and what text hides.

Falling loss is not restored behaviour: layerwise distillation closes most of the KL and may leave retrieval and free
generation where they were. So the same probes, on the same inputs, are put to the teacher, to the swap as it was and to
the repaired model, and the difference to the teacher is paired. One pass over a few held-out tokens gives the shift of
both students at every site against one teacher and one floor: two heatmaps that may share a scale.

In the table the swap has stage `surgery` and the repaired model stage `repair`; both are student `swap`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mismatch.errors import MismatchError
from mismatch.metrics.sums.per_document import Units
from mismatch.probes.needles import Needles
from mismatch.runs.ranks import ALONE, Ranks
from mismatch.runs.table import SWAP
from mismatch.stages.opening import Opened
from mismatch.stages.probe.questions import Questions, answers, light, needs_text, questions
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.knockout import needle_rows
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair
from mismatch.stages.repair.texts import RepairTexts
from mismatch.stages.swapped import reach
from mismatch.stages.trace.batches import measure
from mismatch.stages.trace.meters import Collector
from mismatch.surgery.operate import Student
from mismatch.surgery.students import Teacher
from mismatch.texts.windows import Windows, windows

REPAIRED = "repaired"
USUAL = ("passkey", "needles", "kv_lookup", "induction", "generation")
"""The probes that are asked when none is named, of those that the model can be asked."""
SAMPLES = 8
LENGTH = 256  # tokens of a prompt of passkey and needles, at least
METRICS = ("rel_l2", "norm_ratio")
"""The metrics of the heatmaps: how far, and whether too large or too small."""


def asked(opened: Opened[RepairConfig], texts: RepairTexts) -> tuple[Questions | None, list[str]]:
    """The inputs of the probes, made before a model is there, of the evaluated documents alone: nothing that selects
    checkpoints may be reported.

    Returns:
        The questions; None when none is asked. For each usual probe that cannot be asked a line with the reason.

    Raises:
        MismatchError: a probe that was named cannot be asked.
    """
    if (named := opened.config.probes) is not None:
        return (_made(opened, named, texts) if named else None), []
    names: list[str] = []
    notes: list[str] = []
    for name in USUAL:
        try:
            _made(opened, (name,), texts)
        except MismatchError as refused:
            notes.append(f"the probe {name} is not asked: {refused.message}")
        else:
            names.append(name)
    return (_made(opened, names, texts) if names else None), notes


def _made(opened: Opened[RepairConfig], names: Sequence[str], texts: RepairTexts) -> Questions:
    # batch_size: these inputs are short, and what a training step can hold has no bearing on them.
    # Twice what the local part of the swap holds: where a key stands within it, nothing is retrieved.
    held = reach(opened.planned()[0].plan.clauses)
    length = max(LENGTH, min(2 * held, opened.config.seq_len))
    own = light(
        opened.config, names, controls=(), batch_size=4, samples=SAMPLES, lengths=(str(length),)
    )
    cut = None
    if needs_text(own):
        cut = windows(texts.evaluated, opened.tokenizer, own.seq_len, own.tokens, own.seed)
    return questions(own, opened, cut)


def probe_rows(
    put: Questions,
    teacher: Teacher,
    swap: Student,
    repaired: Student,
    parts: Sequence[ModulePair],
) -> list[dict[str, Any]]:
    """The answers of teacher, swap and repaired model, as rows without run id; of needles also by branches."""
    students = _beside(swap, repaired)
    found = answers(put, teacher, students).rows
    if isinstance(probe := put.probes.get("needles"), Needles):
        local = reach(swap.plan.clauses)
        found += needle_rows(probe, teacher.layout, students, parts, local)
    return [_staged(row) for row in found]


def shift_rows(
    teacher: Teacher,
    swap: Student,
    repaired: Student,
    cut: Windows,
    *,
    batch_size: int,
    seed: int,
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """The shift of both students at every site, and the floor, as rows without run id; several ranks share the windows,
    and the first has the rows."""
    students = _beside(swap, repaired)
    collector = Collector(
        teacher.layout,
        {s.name: s.layout for s in students},
        {s.name: s.plan for s in students},
        METRICS,
        units=Units.by(cut.doc, cut.offset),
        n_pos=cut.seq_len,
        n_tokens=int(cut.scored.sum()),
        seed=seed,
    )
    measure(teacher.layout, students, collector, cut, batch_size=batch_size, ranks=ranks)
    return [_staged(row) for row in collector.rows()] if ranks.first else []


def few(cut: Windows, tokens: int) -> Windows:
    """The first windows, of at most so many tokens but at least one."""
    return cut.part(slice(max(1, tokens // cut.seq_len)))


def _beside(swap: Student, repaired: Student) -> list[Student]:
    """Both with the plan of the swap: blocks behind it that were trained too were not swapped."""
    return [swap, dataclasses.replace(repaired, name=REPAIRED, plan=swap.plan)]


def _staged(row: dict[str, Any]) -> dict[str, Any]:
    if row["student"] != REPAIRED:
        return row
    return row | {"student": SWAP, "stage": "repair"}
