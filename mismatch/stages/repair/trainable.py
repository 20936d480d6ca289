"""The student that learns: a swap once more, and LoRA behind it.

Built beside the swap and over the same teacher, so that the swap stays as it came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from mismatch import spec
from mismatch.forward.verify import prove_student
from mismatch.models.layout import Layout
from mismatch.models.quantised import unpacked
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair, pairs_of
from mismatch.surgery.operate import SEED_STEP, Student, copied, layout_of, operate, placed


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

    def named(self) -> dict[str, Tensor]:
        """Every tensor that a stage may change, by its name in the model."""
        named: dict[str, Tensor] = {
            f"{part.path}.{name}": tensor
            for part in self.parts
            for name, tensor in part.student.state_dict(keep_vars=True).items()
        }
        for companions in self.companions.values():
            named |= companions
        return named | self.neighbours

    def fresh(self) -> dict[str, set[str]]:
        """By path, the parameters that the teacher did not have."""
        fresh: dict[str, set[str]] = {}
        for clause in self.student.plan.clauses:
            fresh.setdefault(clause.path, set()).update(clause.new_parameters)
        return fresh


def trainable(teacher: Layout, config: RepairConfig, swap: Student) -> Trainable:
    """The same as a swap (or a control), to learn; at the start it gives what the swap gives.

    Args:
        teacher: layout of the untouched model.
        config: which stages run says what trains.
        swap: the student that stays as it is, trained before or not.

    Raises:
        MismatchError: a module that cannot be repaired.
    """
    swapped = {clause.path for clause in swap.plan.clauses}
    last = pairs_of(teacher, swap)[-1].layer
    end = min(last + config.lora_blocks, teacher.n_layers - 1)
    student = _with_lora(config, swap, last + 1, end) if config.behind else copied(swap)
    prove_student(teacher, student.layout, student.plan.first)
    parts = tuple(part for part in pairs_of(teacher, student) if part.path in swapped)
    for part in parts:
        _in_full(part.student, student)
    companions = _companions(student, parts) if config.around else {}
    return Trainable(student, parts, companions, _neighbours(student, swapped))


def _with_lora(config: RepairConfig, swap: Student, first: int, last: int) -> Student:
    """The copy with LoRA in the attention and the MLP of these layers; none where `first` is behind `last`."""
    if first > last:
        return copied(swap)
    call = f"lora(r={config.lora_rank}, alpha={float(config.lora_rank)}, targets=all)"
    parsed = spec.parse([f"layers{first}-{last}.{slot}:{call}" for slot in ("attn", "mlp")])
    layout, text, plan = layout_of(swap.model), spec.format(parsed), swap.plan
    student = operate(
        layout,
        placed(parsed, layout),
        spec=text,
        seed=config.seed + SEED_STEP * len(plan.clauses),  # as behind the swap in one text
        tokenizer=swap.tokenizer,
    )
    clauses = (*plan.clauses, *student.plan.clauses)
    student.plan = replace(plan, spec=f"{plan.spec}; {text}", clauses=clauses)
    return student


def _in_full(module: nn.Module, student: Student) -> nn.Module:
    """The module, its quantised matrices as full ones of the model's dtype: codes cannot be trained."""
    return unpacked(module, student.model.dtype)


def _companions(
    student: Student, parts: Sequence[ModulePair]
) -> dict[int, dict[str, nn.Parameter]]:
    """The matrices of each swapped block outside of its parts, by layer and name."""
    found: dict[int, dict[str, nn.Parameter]] = {}
    inside = tuple(f"{part.path}." for part in parts)
    for layer in dict.fromkeys(part.layer for part in parts):
        path = student.layout.slot_path(layer, "block")
        block = _in_full(student.model.get_submodule(path), student)
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
