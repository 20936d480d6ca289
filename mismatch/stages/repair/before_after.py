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

from mismatch.config import ProbeConfig, SwapConfig, fields
from mismatch.errors import MismatchError
from mismatch.runs.table import SWAP
from mismatch.stages.probe.stage import Questions, answers, questions
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.trace.batches import measure
from mismatch.stages.trace.meters import Collector
from mismatch.surgery.operate import Student
from mismatch.surgery.students import Teacher
from mismatch.texts.documents import Documents
from mismatch.texts.windows import Windows

REPAIRED = "repaired"
USUAL = ("passkey", "induction", "generation")
"""The probes that are asked when none is named, of those that the model can be asked."""
SAMPLES = 8
LENGTH = 256  # tokens of a passkey prompt
METRICS = ("rel_l2", "norm_ratio")
"""The metrics of the heatmaps: how far, and whether too large or too small."""


def asked(
    config: RepairConfig, model_config: Any, tokenizer: Any, judged: Documents
) -> tuple[Questions | None, list[str]]:
    """The inputs of the probes, made before a model is there.

    Args:
        config: the settings.
        model_config, tokenizer: of the model.
        judged: the held-out documents that are judged on: nothing else may choose weights and be reported.

    Returns:
        The questions; None when none is asked. For each usual probe that cannot be asked a line that says why.

    Raises:
        MismatchError: a probe that was named cannot be asked.
    """
    if config.probes is not None:
        named = config.probes
        return (_made(config, named, model_config, tokenizer, judged) if named else None), []
    names: list[str] = []
    notes: list[str] = []
    for name in USUAL:
        try:
            _made(config, (name,), model_config, tokenizer, judged)
        except MismatchError as refused:
            notes.append(f"the probe {name} is not asked: {refused.message}")
        else:
            names.append(name)
    found = _made(config, names, model_config, tokenizer, judged) if names else None
    return found, notes


def _made(
    config: RepairConfig,
    names: Sequence[str],
    model_config: Any,
    tokenizer: Any,
    judged: Documents,
) -> Questions:
    shared = {name: getattr(config, name) for name in fields(SwapConfig)}
    usual = fields(ProbeConfig)["seq_len"].default
    shared |= {
        "output": None,
        "run_name": None,
        "controls": (),
        "batch_size": 4,  # short inputs: what a step of training can hold says nothing of them
        "seq_len": max(32, min(config.seq_len, usual)),
    }
    own = ProbeConfig(**shared, probes=tuple(names), samples=SAMPLES, lengths=(str(LENGTH),))
    # `swapped`: nothing calibrates any more, the students are there.
    return questions(own, model_config, tokenizer, judged, None, swapped=True)


def probe_rows(
    put: Questions, teacher: Teacher, swap: Student, repaired: Student
) -> list[dict[str, Any]]:
    """The answers of teacher, swap and repaired model, as rows without run id."""
    found, _ = answers(put, teacher, _beside(swap, repaired))
    return [_staged(row) for row in found]


def shift_rows(
    teacher: Teacher,
    swap: Student,
    repaired: Student,
    cut: Windows,
    *,
    batch_size: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The shift of both students at every site, and the floor, as rows without run id."""
    students = _beside(swap, repaired)
    collector = Collector(
        teacher.layout,
        {s.name: s.layout for s in students},
        {s.name: s.plan.layers for s in students},
        METRICS,
        n_docs=cut.n_docs,
        n_pos=cut.seq_len,
        n_tokens=cut.tokens,
        seed=seed,
    )
    measure(teacher.layout, students, collector, cut, batch_size=batch_size)
    return [_staged(row) for row in collector.rows()]


def few(cut: Windows, tokens: int) -> Windows:
    """The first windows, of at most so many tokens but at least one."""
    n = max(1, tokens // cut.seq_len)
    docs = cut.doc[:n]  # numbered in order of first appearance
    return dataclasses.replace(
        cut, ids=cut.ids[:n], doc=docs, names=cut.names[: int(docs.max()) + 1]
    )


def _beside(swap: Student, repaired: Student) -> list[Student]:
    """Both with the plan of the swap: blocks behind it that learnt too were not swapped."""
    return [swap, dataclasses.replace(repaired, name=REPAIRED, plan=swap.plan)]


def _staged(row: dict[str, Any]) -> dict[str, Any]:
    if row["student"] != REPAIRED:
        return row
    return row | {"student": SWAP, "stage": "repair"}
