"""Where a student is not its teacher, found by comparing them: what a record says may be less than what was trained.

    configs    a setting that enters the forward pass (a RoPE base, a window) may change every block
    tensors    block by block, to the bit; the embedding, the final norm, the head
    a run      of a few tokens: what no tensor shows (another attention implementation, a hook)

Blocks in front of the first difference run once for both; what lies behind is the student's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mismatch.forward.verify import first_moved
from mismatch.models.layout import Layout
from mismatch.models.private import same_memory
from mismatch.runs.plan import Apart
from mismatch.surgery.operate import Student

OUTSIDE = (
    *("_name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    *("initializer_range", "id2label", "label2id", "problem_type", "task_specific_params"),
)
"""Settings of a config that do not enter the forward pass, or that the tensors show."""


def compared(teacher: Layout, student: Student) -> Student:
    """A student that was there before the run, with what differs in its plan, where that is more than was replaced.

    Args:
        teacher: layout of the model that it is compared with.
        student: of the same depth and width.
    """
    found, layout = _of_tensors(teacher, student.layout), student.layout
    every = Apart(tuple(range(teacher.n_layers)), front=True, end=True)
    warnings = []
    if found != Apart(student.plan.layers, end=student.plan.end) and student.plan.clauses:
        warnings.append(
            f"not only what was swapped differs from the teacher: {found.text()}; what is measured is the work of all "
            "that was trained"
        )
    if settings := sorted(_settings(teacher.config, layout.config)):
        warnings.append(
            f"the student's config differs from the teacher's in {', '.join(settings)}: every layer may differ"
        )
        found = every
    elif moved := first_moved(teacher, layout, _first(found, teacher.n_layers)):
        warnings.append(
            f"the student's {moved.site} of layer {moved.layer} differs from the teacher's although its tensors do "
            "not: every layer may differ"
        )
        found = every
    plan = student.plan
    if found == Apart(plan.layers, end=plan.end):
        return student  # nothing but the replaced modules
    plan = replace(plan, apart=found, warnings=(*plan.warnings, *warnings))
    return replace(student, plan=plan)


def _of_tensors(teacher: Layout, student: Layout) -> Apart:
    pairs = zip(teacher.blocks, student.blocks, strict=True)
    blocks = tuple(layer for layer, pair in enumerate(pairs) if not _alike(*map(_all, pair)))
    rest = (f"{teacher.family.blocks}.", f"{teacher.family.final_norm}.")
    front = not _alike(*(_but(rest, layout.decoder) for layout in (teacher, student)))
    ends = ((layout.final_norm, layout.output) for layout in (teacher, student))
    end = not all(_alike(*map(_all, pair)) for pair in zip(*ends, strict=True))
    return Apart(blocks, front, end)


def _first(found: Apart, n_layers: int) -> int:
    return 0 if found.front else min(found.blocks, default=n_layers)


def _all(module: nn.Module) -> dict[str, Any]:
    """The classes of a module tree and its tensors, by name."""
    return dict(_named(module))


def _but(inside: tuple[str, ...], module: nn.Module) -> dict[str, Any]:
    """As `_all`, without what lies under these names."""
    return {n: v for n, v in _named(module) if n and not f"{n}.".startswith(inside)}


def _named(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from ((name, type(one)) for name, one in module.named_modules(remove_duplicate=False))
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _alike(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(same(one, theirs[n]) for n, one in ours.items())


def same(ours: Any, theirs: Any) -> bool:
    """One class, or tensors that are equal to the bit (a zero has two, and NaN equals nothing)."""
    if ours is theirs:
        return True
    if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor)):
        return False
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape or ours.device != theirs.device:
        return False
    return same_memory(ours, theirs) or bool(torch.equal(ours, theirs))


def _settings(teacher: Any, student: Any) -> set[str]:
    """Names of the settings in which two configs differ, of those that may enter the forward pass."""
    ours, theirs = (
        {**config.to_dict(), "attention implementation": config._attn_implementation}
        for config in (teacher, student)
    )
    names = {name for name in ours.keys() | theirs.keys() if name not in OUTSIDE}
    return {name for name in names if ours.get(name) != theirs.get(name)}
