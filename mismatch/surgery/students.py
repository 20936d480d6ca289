"""From a swap text to a student: calibrate, swap, and prove that nothing in front of the swap changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mismatch import spec
from mismatch.errors import SurgeryError
from mismatch.forward.calibrate import calibrate
from mismatch.forward.verify import prove_student
from mismatch.models.layout import Layout
from mismatch.models.load import ModelInfo
from mismatch.models.swap_record import Base
from mismatch.surgery.controls import control_specs
from mismatch.surgery.operate import Student, calibrators, operate, placed
from mismatch.texts.windows import Windows

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
    """The settings of a command's students."""

    @property
    def swap_spec(self) -> spec.Spec: ...
    @property
    def controls(self) -> Sequence[str]: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...


def students_of(
    teacher: Teacher,
    config: SwapSettings,
    calibration: Windows | None,
    swap: Student | None = None,
) -> list[Student]:
    """The swap first, then its controls in the same slots.

    Args:
        teacher: the untouched model.
        config: swap and controls.
        calibration: windows for mechanisms that set themselves from them; None: there is no such mechanism.
        swap: a student that exists already, and was compared; None builds the one of the config.

    Raises:
        MismatchError: as `calibrated_swap`.
    """

    def build(parsed: spec.Spec, name: str = "swap") -> Student:
        return calibrated_swap(
            teacher,
            parsed,
            calibration,
            batch_size=config.batch_size,
            seed=config.seed,
            name=name,
        )

    first = swap or build(config.swap_spec)
    controls = control_specs(config.controls, first.plan)
    return [first, *(build(parsed, name) for name, parsed in controls.items())]


def calibrated_swap(
    teacher: Teacher,
    parsed: spec.Spec,
    calibration: Windows | None = None,
    *,
    batch_size: int = 1,
    seed: int = 0,
    name: str = "swap",
) -> Student:
    """Build a student.

    Args:
        teacher: the untouched model.
        parsed: what to replace.
        calibration: windows for mechanisms that set themselves from them; None: there is no such mechanism.
        batch_size: windows per forward pass over them.
        seed: of every new tensor.
        name: of the student.

    Raises:
        SpecError: the swap does not fit the model.
        SurgeryError: a mechanism cannot be built in its slot, or needs calibration text and there is none.
    """
    placements = placed(parsed, teacher.layout)
    wanted = calibrators(placements)
    if wanted:
        if calibration is None:
            raise SurgeryError(f"`{spec.format(parsed)}` sets itself from text, and none was given")
        device = teacher.layout.embedding_device
        batches = (
            torch.from_numpy(batch.ids).to(device) for batch in calibration.batches(batch_size)
        )
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
