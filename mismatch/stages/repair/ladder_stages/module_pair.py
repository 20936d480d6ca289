"""A replaced module of the student, beside the module of the teacher that it stands for.

Repair works on modules, not on models: the teacher's module was shown its inputs once, the student's learns to give the
same outputs. How the host calls the module (rotary cos and sin, mask, positions) is taken from the teacher's own run,
so there is no code per family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.forward import hooks
from mismatch.mechanisms.parts.calling import CACHE_NAMES, first_of
from mismatch.models.layout import Layout
from mismatch.surgery.operate import Student


@dataclass(frozen=True)
class ModulePair:
    """One module that was swapped.

    Attributes:
        layer, slot: where.
        path: of the module, the same in both models.
        teacher, student: the module there.
    """

    layer: int
    slot: str
    path: str
    teacher: nn.Module
    student: nn.Module

    @property
    def where(self) -> str:
        return f"layer{self.layer}.{self.slot}"


@dataclass(frozen=True)
class Call:
    """How the host calls a module: dtype of the stream, further positional and keyword arguments of one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_keyword: bool
    dtype: torch.dtype

    def __call__(self, module: Callable[..., Any], x: Tensor) -> Tensor:
        """The output of a module, or of anything that is called as it is, for the stream `x`, `batch pos d_model`."""
        args, kwargs = _rows(self.args, len(x)), _rows(self.kwargs, len(x))
        x = x.to(self.dtype)
        if self.by_keyword:
            return first_of(module(*args, hidden_states=x, **kwargs))
        return first_of(module(x, *args, **kwargs))


def tensors_of(part: ModulePair) -> list[Tensor]:
    """Every tensor of the student's module."""
    return [*part.student.state_dict().values()]


def pairs_of(teacher: Layout, student: Student) -> tuple[ModulePair, ...]:
    """The swapped modules in depth order, each once however many wrappers stand there.

    Raises:
        SurgeryError: nothing was swapped; a module outside the blocks, which has no layer to repair.
    """
    if not student.plan.clauses:
        raise SurgeryError(
            "nothing was swapped in this student, so there is no module to repair",
            hint="`mismatch trace` measures a fine-tune layer by layer",
        )
    found: dict[str, ModulePair] = {}
    for clause in student.plan.clauses:
        if clause.layer is None:
            raise SurgeryError(
                f"`{clause.mechanism}` at {clause.slot} cannot be repaired: it stands outside the blocks",
                hint="repair works on modules of blocks; swap norm1, norm2 or norms of a layer",
            )
        module = student.model.get_submodule(clause.path)
        theirs = teacher.model.get_submodule(clause.path)
        found[clause.path] = ModulePair(clause.layer, clause.slot, clause.path, theirs, module)
    order = {slot: i for i, slot in enumerate(teacher.family.slot_names())}
    return tuple(sorted(found.values(), key=lambda p: (p.layer, order.get(p.slot, len(order)))))


@torch.no_grad()
def watch(
    layout: Layout, paths: Iterable[str], ids: Tensor, *, last: int
) -> dict[str, tuple[Tensor, Tensor, Call]]:
    """Run blocks 0..last and note what goes into the modules at `paths` and what comes out.

    Args:
        layout: of the model to run.
        paths: of modules inside these blocks.
        ids: int64 `batch pos`.
        last: the last block that runs; no head, nothing behind it.

    Returns:
        path -> input `batch pos d`, output `batch pos d`, and how it was called.
    """
    seen: dict[str, tuple[Tensor, Tensor, Call]] = {}
    handles = []
    for path in paths:

        def note(_module: Any, args: tuple, kwargs: dict, out: Any, path: str = path) -> None:
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            by_keyword = "hidden_states" in kwargs
            rest = {
                name: value
                for name, value in kwargs.items()
                if name != "hidden_states" and name not in CACHE_NAMES
            }
            call = Call(args if by_keyword else args[1:], rest, by_keyword, x.dtype)
            seen[path] = (x, first_of(out), call)

        module = layout.model.get_submodule(path)
        handles.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        hooks.run(layout, ids, stop=last + 1)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _rows(value: Any, n: int) -> Any:
    """What the host hands down, for `n` rows: windows are full, so every row of a batch is called alike."""
    if isinstance(value, Tensor):
        return value[:n] if value.ndim > 1 and value.shape[0] > 1 else value
    if isinstance(value, dict):
        return {name: _rows(item, n) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_rows(item, n) for item in value)
    return value
