"""From a swap text to a student: calibrate, swap, and prove that nothing in front of the swap changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import torch

from mismatch import spec
from mismatch.forward.calibrate import calibrate
from mismatch.forward.verify import prove_student
from mismatch.models.layout import Layout
from mismatch.models.load import ModelInfo
from mismatch.models.swap_record import Base
from mismatch.surgery.controls import control_specs
from mismatch.surgery.operate import Student, calibrators, operate, placed
from mismatch.texts.documents import read
from mismatch.texts.windows import windows

if TYPE_CHECKING:
    from mismatch.models.layout import CausalLM


@dataclass(frozen=True)
class Teacher:
    """The model that students are compared with: untouched, or a checkpoint with its swap. Its layout is proven."""

    model: CausalLM
    tokenizer: Any
    layout: Layout
    info: ModelInfo


class SwapSettings(Protocol):
    """What the config of a command says about its students."""

    @property
    def swap_spec(self) -> spec.Spec: ...
    @property
    def controls(self) -> Sequence[str]: ...
    @property
    def calibration_tokens(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...


class _Options(TypedDict):
    calibration: Any
    tokens: int
    seq_len: int
    batch_size: int
    seed: int


def students_of(
    teacher: Teacher, config: SwapSettings, calibration: Any, swap: Student | None = None
) -> list[Student]:
    """The swap first, then its controls in the same slots.

    Args:
        teacher: the untouched model.
        config: swap, controls, and how much calibration text is read.
        calibration: text, read only when a mechanism asks for it.
        swap: a student that exists already; None builds the one of the config.

    Raises:
        MismatchError: as `calibrated_swap`.
    """
    options: _Options = {
        "calibration": calibration,
        "tokens": config.calibration_tokens,
        "seq_len": config.seq_len,
        "batch_size": config.batch_size,
        "seed": config.seed,
    }
    first = swap or calibrated_swap(teacher, config.swap_spec, **options)
    controls = control_specs(config.controls, first.plan)
    return [
        first,
        *(calibrated_swap(teacher, s, name=name, **options) for name, s in controls.items()),
    ]


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
        SurgeryError: a mechanism cannot be built in its slot.
        DataError: no usable calibration text.
    """
    placements = placed(parsed, teacher.layout)
    wanted = calibrators(placements)
    if wanted:
        text = read(calibration)
        cut = windows(text, teacher.tokenizer, min(seq_len, tokens), tokens, seed)
        device = teacher.layout.embedding_device
        batches = (torch.from_numpy(batch.ids).to(device) for batch in cut.batches(batch_size))
        calibrate(teacher.layout, wanted, batches)
    student = operate(
        teacher.layout,
        placements,
        spec=spec.format(parsed),
        seed=seed,
        calibrations=wanted,
        name=name,
        tokenizer=teacher.tokenizer,
        base=_base(teacher.info),
    )
    prove_student(teacher.layout, student.layout, student.plan.first)
    return student


def _base(info: ModelInfo) -> Base:
    """What a checkpoint records of the model that was swapped: of a folder its name, not its path."""
    name = Path(info.name).name if Path(info.name).expanduser().is_dir() else info.name
    return Base(name, info.sha256)
