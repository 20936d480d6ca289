"""A student that was trained elsewhere: a checkpoint of a swapped model, or a fine-tune of the teacher.

What was swapped is read from its record; where it is not the teacher is found by comparing (`compared`). What cannot be
set beside the teacher (another shape, other tokens) is refused from the configs, before weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mismatch import spec
from mismatch.errors import ModelError
from mismatch.forward.verify import prove_student
from mismatch.models.layout import Layout
from mismatch.models.offloaded import offloaded
from mismatch.models.swap_record import Base, Record
from mismatch.runs.plan import Apart, Replaced, SwapPlan
from mismatch.surgery.compared import compared
from mismatch.surgery.loading import rebuilt
from mismatch.surgery.operate import Student
from mismatch.surgery.saving import Swapped
from mismatch.surgery.students import Teacher

SAMPLE = "The quick brown fox: 12,345 jumps!\n\n\tÜber 東京 … e = mc²  'tis\n"
"""What two tokenizers must cut alike."""


def record_of(model: Any) -> Record | None:
    """What was swapped in a model that is in memory; None: nothing."""
    return model.swap_record if isinstance(model, Swapped) else None


def foreseen(
    teacher: Layout, plain: Layout, found: Record | None, name: str, where: Path | str
) -> Student:
    """The student as its config and its record tell it, on the meta device.

    Args:
        teacher: without its weights.
        plain: the student without its weights, and without its swaps.
        found: its record; None: nothing was swapped.
        name: of the student, for errors.
        where: its folder, for errors.

    Returns:
        The student; where it differs is not known yet, so its plan says everywhere.

    Raises:
        ModelError: it has another shape than the teacher, or its swaps cannot be made here.
    """
    check_shape(teacher, plain, name)
    known, swaps = _swaps(record_of(teacher.model)), _swaps(found)
    common = len(known) if swaps[: len(known)] == known else 0
    text = "; ".join(spec.format(swap) for swap in swaps[common:])
    clauses: tuple[Replaced, ...] = ()
    layout = plain
    if found is not None:
        layout, clauses = rebuilt(plain, found, where, known=common)
    every = Apart(tuple(range(teacher.n_layers)), front=True, end=True)
    return Student(layout.model, layout, SwapPlan(spec=text, clauses=clauses, apart=every))


def adopted(
    teacher: Teacher, student: Student, *, base: Base | None = None, notes: Sequence[str] = ()
) -> Student:
    """The student with its weights, compared with the teacher.

    Args:
        teacher: with its weights.
        student: its plan is the one that was foreseen, or that of its surgery.
        base: what its record says that it was made from; None: it says nothing.
        notes: warnings for the plan.

    Raises:
        ModelError: it has another dtype, or lies on another device.
        LayoutError: a mechanism carries state from one call to the next.
    """
    _check_numbers(teacher.layout, student.layout)
    for who, layout in (("teacher", teacher.layout), ("student", student.layout)):
        if names := offloaded(layout.model):
            raise ModelError(
                f"the {who}'s {names[0]} was offloaded ({len(names)} tensors were), and a student from elsewhere is "
                "compared with its teacher tensor by tensor",
                hint="load both without offloading: a smaller dtype, or a --device-map of devices alone",
            )
    bare = replace(student, plan=replace(student.plan, apart=None))
    found = compared(teacher.layout, bare)
    prove_student(teacher.layout, found.layout, found.plan.first)
    plan, info = found.plan, teacher.info
    if plan.apart is not None and base is not None and base.sha256 != info.sha256:
        notes = (
            *notes,
            f"the student was made from {base.name} ({base.sha256[:12]}), the teacher is {info.name} "
            f"({info.sha256[:12]}): what differs between these two is measured, too",
        )
    return replace(found, plan=replace(plan, warnings=(*notes, *plan.warnings)))


def check_shape(teacher: Layout, student: Layout, name: str) -> None:
    """Whether every site and every prediction of a student has its own in the teacher.

    Raises:
        ModelError: another family, depth, width or vocabulary.
    """
    facts = (
        ("family", lambda layout: layout.family.name),
        ("layers", lambda layout: layout.n_layers),
        ("width", lambda layout: layout.d_model),
        ("vocabulary", lambda layout: layout.vocab),
    )
    other = [
        f"{what} {theirs(student)}, the teacher's is {theirs(teacher)}"
        for what, theirs in facts
        if theirs(student) != theirs(teacher)
    ]
    if other:
        raise ModelError(
            f"the student {name} is not of the teacher's shape: {'; '.join(other)}",
            hint="give a student that was made from this teacher, or the teacher that it was made from",
        )


def check_tokens(teacher: Any, student: Any, name: str) -> None:
    """Whether one text gives both models the same ids; special tokens may have other names.

    Raises:
        ModelError: it does not.
    """
    if teacher is None or student is None or student is teacher:
        return
    ours, theirs = _words(teacher), _words(student)
    found = next((word for word in ours if ours[word] != theirs.get(word)), None)
    if found is not None:
        what = f"token {ours[found]} is {found!r} in the teacher's alone"
    elif teacher(SAMPLE, add_special_tokens=False) != student(SAMPLE, add_special_tokens=False):
        what = "they cut the same text into other tokens"
    else:
        return
    raise ModelError(
        f"the student {name} has another tokenizer than the teacher: {what}",
        hint="both models are given the same token ids; give a student that was made from this teacher",
    )


def _words(tokenizer: Any) -> dict[str, int]:
    special = tokenizer.get_added_vocab()
    return {token: id for token, id in tokenizer.get_vocab().items() if token not in special}


def _check_numbers(teacher: Layout, student: Layout) -> None:
    for what, ours, theirs, hint in (
        (
            "dtype",
            teacher.model.dtype,
            student.model.dtype,
            "load both in one: mismatch.load(..., dtype=...)",
        ),
        (
            "device",
            teacher.embedding_device,
            student.embedding_device,
            "put both on one: mismatch.load(..., device=...)",
        ),
    ):
        if ours != theirs:
            raise ModelError(
                f"the student's {what} is {str(theirs).removeprefix('torch.')}, the teacher's is "
                f"{str(ours).removeprefix('torch.')}",
                hint=hint,
            )


def _swaps(found: Record | None) -> tuple[spec.Spec, ...]:
    """The swaps of a record with every argument written out, so that one swap is one text."""
    texts = () if found is None else (spec.parse(swap.text) for swap in found.swaps)
    return tuple(spec.parse(spec.explicit(text)) for text in texts)
