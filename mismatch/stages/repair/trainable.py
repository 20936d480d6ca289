"""The student that learns: a swap once more, and LoRA behind it.

Built beside the swap and over the same teacher, so that the swap stays as it came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mismatch import spec
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair, pairs_of
from mismatch.surgery.operate import Student
from mismatch.surgery.students import Teacher, calibrated_swap
from mismatch.texts.windows import Windows


@dataclass(frozen=True)
class Trainable:
    """What a ladder trains.

    Attributes:
        student: the model.
        parts: the swapped modules in depth order.
        companions: by layer and name, the matrices of each swapped block outside of its parts.
        neighbours: what LoRA added in the blocks behind, by name.
    """

    student: Student
    parts: tuple[ModulePair, ...]
    companions: dict[int, dict[str, nn.Parameter]]
    neighbours: dict[str, nn.Parameter]


def trainable(
    teacher: Teacher, config: RepairConfig, swap: Student, calibration: Windows | None
) -> Trainable:
    """The same as a swap (or a control), to learn; at the start it gives what the swap gives.

    Args:
        teacher: the untouched model.
        config: which stages run says what trains.
        swap: the student that stays as it is.
        calibration: windows for mechanisms that set themselves from them.

    Raises:
        MismatchError: as `calibrated_swap`; a module that cannot be repaired.
    """
    swapped = {clause.path for clause in swap.plan.clauses}
    last = pairs_of(teacher.layout, swap)[-1].layer
    text = [swap.plan.spec]
    end = min(last + config.lora_blocks, teacher.layout.n_layers - 1)
    if config.behind and end > last:
        lora = f"lora(r={config.lora_rank}, alpha={float(config.lora_rank)}, targets=all)"
        text += [f"layers{last + 1}-{end}.{slot}:{lora}" for slot in ("attn", "mlp")]
    student = calibrated_swap(
        teacher,
        spec.parse(text),
        calibration,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    parts = tuple(part for part in pairs_of(teacher.layout, student) if part.path in swapped)
    for part in parts:
        # A student that was handed over may have been trained: the repair starts from its own tensors.
        part.student.load_state_dict(swap.model.get_submodule(part.path).state_dict())
    companions = _companions(student, parts) if config.around else {}
    return Trainable(student, parts, companions, _neighbours(student, swapped))


def _companions(
    student: Student, parts: Sequence[ModulePair]
) -> dict[int, dict[str, nn.Parameter]]:
    """The matrices of each swapped block outside of its parts, by layer and name."""
    found: dict[int, dict[str, nn.Parameter]] = {}
    inside = tuple(f"{part.path}." for part in parts)
    for layer in dict.fromkeys(part.layer for part in parts):
        path = student.layout.slot_path(layer, "block")
        block = student.model.get_submodule(path)
        found[layer] = {
            name: parameter
            for inner, parameter in block.named_parameters()
            if parameter.ndim > 1
            and parameter.is_floating_point()
            and not (name := f"{path}.{inner}").startswith(inside)
        }
    return found


def _neighbours(student: Student, swapped: set[str]) -> dict[str, nn.Parameter]:
    """What LoRA added behind the parts, by name."""
    return {
        f"{clause.path}.{name}": student.model.get_submodule(clause.path).get_parameter(name)
        for clause in student.plan.clauses
        if clause.path not in swapped
        for name in clause.new_parameters
    }
