"""From a swap text to a student: calibrate what wants it, operate, prove that nothing in front of the swap changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mismatch import data as texts
from mismatch import models, spec, surgery
from mismatch.checking import placed
from mismatch.layout import Layout
from mismatch.surgery import Student
from mismatch.tracing import probe
from mismatch.tracing.calibrate import calibrate
from mismatch.windows import windows


@dataclass(frozen=True)
class Teacher:
    """An untouched model, with its tokenizer and its proven layout."""

    model: torch.nn.Module
    tokenizer: Any
    layout: Layout
    info: models.ModelInfo


def calibrated_swap(
    teacher: Teacher,
    parsed: spec.Spec,
    *,
    calibration: Any,
    tokens: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    name: str = "swap",
) -> Student:
    """Build a student. The calibration text is read only when a mechanism asks for it.

    Raises:
        SpecError: the swap does not fit the model.
        SurgeryError: a mechanism cannot be built here.
        DataError: no usable calibration text.
    """
    placements = placed(parsed, teacher.layout)
    wanted = surgery.calibrators(placements)
    if wanted:
        text = texts.read(calibration)
        cut = windows(text, teacher.tokenizer, min(seq_len, tokens), tokens, seed)
        device = teacher.layout.embedding_device
        batches = (torch.from_numpy(batch.ids).to(device) for batch in cut.batches(batch_size))
        calibrate(teacher.layout, wanted, batches)
    student = surgery.operate(
        teacher.layout,
        placements,
        spec=spec.format(parsed),
        seed=seed,
        calibrations=wanted,
        name=name,
        tokenizer=teacher.tokenizer,
    )
    probe.prove_student(teacher.layout, student.layout, student.plan.first)
    return student
