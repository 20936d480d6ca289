"""Swap modules of a model for mechanisms, record what was replaced, and undo it.

The student is a second module tree whose tensors are copies on write of the teacher's (`mismatch.models.private`): both
run side by side, a weight that neither writes to exists once, and whatever is done to one leaves the other as it is.
A mechanism is built from such a copy of the module it replaces, so the module that `undo` puts back is untouched too.
Surgery replaces modules and never adds a hook that changes a value (nnsight reads values before hooks). Of the two it
adds, one passes on what the caller told the model of its tokens, padding and texts, because transformers does not
(`parts/token_facts.py`); one warns of what transformers cannot record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mismatch.errors import ConfigError, MismatchError, SpecError, SurgeryError
from mismatch.forward.measured import measured, share_lock
from mismatch.mechanisms.base import Calibrator, Context, Mechanism, Wrapper
from mismatch.mechanisms.parts.some_heads import SomeHeads, SomeHeadsConfig
from mismatch.mechanisms.parts.token_facts import add_token_facts
from mismatch.mechanisms.parts.user_module import configured
from mismatch.models.families import family_of
from mismatch.models.layout import HEADS, Layout
from mismatch.models.offloaded import fetch
from mismatch.models.private import configs_of, private_copy
from mismatch.models.swap_record import Base, Swap
from mismatch.runs.plan import Replaced, SwapPlan
from mismatch.spec import Call, Clause, Heads, Placement, Spec, parse, resolve
from mismatch.surgery import merging, saving
from mismatch.surgery.audited import audited
from mismatch.surgery.recorded import warn_of_records

if TYPE_CHECKING:
    from mismatch.models.layout import CausalLM

SEED_STEP = 1000
"""Between the seeds of two placements of one swap."""

Calibrations = Mapping[tuple[int | None, str, Call], Calibrator]


@dataclass
class Student:
    """A model with replaced modules. `model` is an ordinary transformers model that shares memory with the teacher."""

    model: CausalLM
    layout: Layout
    plan: SwapPlan
    tokenizer: Any = None
    name: str = "swap"
    teacher: CausalLM | None = field(default=None, repr=False)
    """The model that it was made from; None: it came as it is."""
    _undo: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Make `model` a copy of the teacher again, whatever was done to it: swapped, trained, moved, resized, merged.

        The logits are then bit-equal to the teacher's. `model` stays the same object; its modules and tensors are new
        ones, so an optimizer over the old ones trains nothing any more.

        Raises:
            SurgeryError: it was not made from a model in this process.
        """
        if self.teacher is None:
            raise SurgeryError(
                "this student came as it is, so there is nothing to go back to",
                hint="undo() is for a student that mismatch.swap made",
            )
        with measured(self.teacher):
            fresh = private_copy(self.teacher)
            self.model.__class__, self.model.__dict__ = type(fresh), fresh.__dict__
            _listen(self)
        self._undo.clear()
        self.plan = SwapPlan(spec="", clauses=())

    def save(
        self, path: str | Path, *, extra: Mapping[str, Any] | None = None, overwrite: bool = False
    ) -> Path:
        """Write the swapped model as a Hugging Face folder, which `mismatch.load` and transformers read.

        Args:
            path: the folder to make.
            extra: facts about these weights; becomes mismatch.json.
            overwrite: replace a checkpoint in that folder; nothing else is ever replaced.

        Raises:
            SurgeryError, OutputError, RunError: as `mismatch.surgery.saving.save`.
        """
        if not self.plan.spec:
            raise SurgeryError(
                "the student holds no swap that could be saved: it was undone, or it is being scanned",
                hint="swap the teacher again",
            )
        return saving.save(
            self.model, path, tokenizer=self.tokenizer, extra=extra, overwrite=overwrite
        )

    def merged(self) -> CausalLM:
        """The plain transformers model that computes the same: adapters and factors multiplied into the matrices.

        `student.merged().save_pretrained(path)` writes a folder that loads without mismatch. The student stays as it
        is.

        Raises:
            SurgeryError: a mechanism that cannot be merged.
        """
        return merging.merged(self.model)

    def whole_blocks(self) -> frozenset[int]:
        """Layers whose block was replaced as a whole: the modules inside them no longer add to the stream."""
        return frozenset(
            c.layer for c in self.plan.clauses if c.slot == "block" and c.layer is not None
        )


def operate(
    layout: Layout,
    placements: Sequence[Placement],
    *,
    spec: str,
    seed: int = 0,
    calibrations: Calibrations | None = None,
    name: str = "swap",
    tokenizer: Any = None,
    base: Base | None = None,
    restoring: bool = False,
) -> Student:
    """Build the student: copy the teacher's tree and replace the modules of `placements`, in their order.

    Args:
        layout: of the teacher, which is not changed.
        placements: from `mismatch.spec.resolve`.
        spec: the canonical text of the swap.
        seed: of every new tensor.
        calibrations: filled calibrators by (layer, slot, call), for mechanisms that need one; the slot is `HEADS` for
            those that take some heads.
        name: the student's name in the table.
        tokenizer: kept beside the model.
        base: name and fingerprint of the teacher, for a checkpoint.
        restoring: the tensors are read from a checkpoint afterwards; nothing need be calibrated.

    Raises:
        SurgeryError: a mechanism cannot be built in its slot, or fails on the module it replaces.
    """
    student = blank(layout, name=name, tokenizer=tokenizer)
    clauses = replace(
        student, placements, seed=seed, calibrations=calibrations, restoring=restoring
    )
    student.plan = SwapPlan(spec=spec, clauses=clauses)
    saving.mark(student.model, Swap(spec, seed), base)
    return student


def blank(layout: Layout, *, name: str = "swap", tokenizer: Any = None) -> Student:
    """A student in which nothing is replaced yet."""
    model = private_copy(layout.model)
    own = Layout(model, layout.family, layout.whole_blocks)
    student = Student(model, own, SwapPlan(spec="", clauses=()), tokenizer, name)
    student.teacher = layout.model
    _listen(student)
    share_lock(model, layout.model)
    return student


def copied(student: Student) -> Student:
    """The same student once more: training one does not move the other."""
    own = blank(layout_of(student.model), tokenizer=student.tokenizer)
    own.plan = student.plan
    return own


def _listen(student: Student) -> None:
    """The hooks of every forward; they change no value."""
    student.model.base_model.register_forward_pre_hook(add_token_facts, with_kwargs=True)
    warn_of_records(student.layout.decoder)


@contextmanager
def holding(
    student: Student,
    placements: Sequence[Placement],
    *,
    seed: int = 0,
    calibrations: Calibrations | None = None,
) -> Iterator[tuple[Replaced, ...]]:
    """Replace more modules of a student while the context lives, without another tree.

    One tree serves many swaps, one after the other, as in a scan over layers. What a swap builds is freed at its end.
    """
    before, plan = len(student._undo), student.plan
    try:
        added = replace(student, placements, seed=seed, calibrations=calibrations)
        student.plan = SwapPlan(spec="", clauses=(*plan.clauses, *added))
        yield added
    finally:
        while len(student._undo) > before:
            holder, name, original = student._undo.pop()
            setattr(holder, name, original)
        student.plan = plan


@contextmanager
def given_back(student: Student, layer: int | None) -> Iterator[None]:
    """The original modules of one layer stand in a student again while the context lives; None: of none."""
    held = []
    for (holder, name, original), clause in zip(student._undo, student.plan.clauses, strict=True):
        if layer is not None and clause.layer == layer:
            held.append((holder, name, getattr(holder, name)))
            setattr(holder, name, original)
    try:
        yield
    finally:
        for holder, name, new in reversed(held):
            setattr(holder, name, new)


def beside(student: Student) -> Iterator[tuple[int | None, nn.Module, nn.Module]]:
    """Of each clause the layer, the original module, and what stands in its place."""
    for (holder, name, original), clause in zip(student._undo, student.plan.clauses, strict=True):
        yield clause.layer, original, getattr(holder, name)


def replace(
    student: Student,
    placements: Sequence[Placement],
    *,
    seed: int = 0,
    calibrations: Calibrations | None = None,
    restoring: bool = False,
) -> tuple[Replaced, ...]:
    """Put mechanisms into a student's tree, in the order of `placements`; see `operate`."""
    # Mechanisms keep `build`; it must not keep the student, and with it the teacher.
    model, layout = student.model, student.layout
    replaced = []
    for index, placement in enumerate(placements):
        path = layout.slot_path(placement.layer, placement.slot)
        holder, attribute = _held(model, path, placement)
        original = getattr(holder, attribute)
        inherited = fetch(private_copy(original, keep=configs_of(original)))

        def build(
            call: Call,
            module: nn.Module,
            where: Placement = placement,
            at: int = index,
            outer: nn.Module = inherited,
        ) -> Mechanism:
            context = Context(
                layer=where.layer,
                slot=where.slot,
                n_layers=layout.n_layers,
                d_model=layout.d_model,
                model_config=model.config,
                family=layout.family,
                seed=seed + SEED_STEP * at,
                calibration=(calibrations or {}).get(_measured_at(where, call)),
                build=build,
                restoring=restoring,
                width=layout.heads_width if where.heads else None,
            )
            heads = (
                where.heads if module is outer else ()
            )  # what it nests is built over all of them
            return construct(call, module, context, heads)

        new = build(placement.call, inherited)
        _lay_out(new, inherited)
        new.train(original.training)
        setattr(holder, attribute, new)
        student._undo.append((holder, attribute, original))
        replaced.append(audited(placement, path, inherited, new))
    return tuple(replaced)


def _held(model: nn.Module, path: str, placement: Placement) -> tuple[nn.Module, str]:
    """The module that has the one at `path` as its child, and the name of that child.

    A wrapper passes attributes of the module it wraps through; a child set on the wrapper itself would never be called.

    Raises:
        SurgeryError: the module around it was replaced, and the replacement has no such child.
    """
    parent, _, attribute = path.rpartition(".")
    try:
        model.get_submodule(path)
    except AttributeError as error:
        raise SurgeryError(
            f"`{placement.call.name}` at layer {placement.layer} `{placement.slot}`: the module around it was replaced "
            f"as a whole, and {error}",
            hint="leave one of the two clauses out",
        ) from error
    holder = model.get_submodule(parent)
    while isinstance(holder, Wrapper) and attribute not in dict(holder.named_children()):
        holder = holder.original
    return holder, attribute


def placed(parsed: Spec, layout: Layout) -> tuple[Placement, ...]:
    """The slots that a swap touches in this model, which may have been swapped before.

    Raises:
        SpecError: a layer or a slot that the model does not have, or a slot that is taken.
    """
    earlier = _swapped_before(layout.model)
    both = Spec((*earlier, *parsed.clauses), parsed.text)
    return tuple(
        dataclasses.replace(one, clause_index=one.clause_index - len(earlier))
        for one in resolved(both, layout)
        if one.clause_index >= len(earlier)
    )


def layout_of(model: CausalLM) -> Layout:
    """The layout of a plain model, checked, or of one that was swapped before.

    Raises:
        LayoutError: unknown family, or a plain model that lacks a path of its family.
    """
    if not isinstance(model, saving.Swapped):
        return Layout.of(model)
    layout = Layout(model, family_of(model.config))
    taken = resolved(Spec(_swapped_before(model), ""), layout)
    whole = {p.layer for p in taken if p.slot == "block" and p.layer is not None}
    return dataclasses.replace(layout, whole_blocks=frozenset(whole))


def resolved(spec: Spec, layout: Layout) -> tuple[Placement, ...]:
    """The slots of a swap in a model of this layout, taken or not; as `mismatch.spec.resolve`."""
    family = layout.family
    heads = Heads(layout.n_heads, layout.n_kv_heads)
    return resolve(spec, layout.n_layers, family.slot_names(), family.name, family.lacks, heads)


def _swapped_before(model: CausalLM) -> tuple[Clause, ...]:
    swaps = model.swap_record.swaps if isinstance(model, saving.Swapped) else ()
    return tuple(clause for swap in swaps for clause in parse(swap.text).clauses)


def construct(
    call: Call, original: nn.Module, context: Context, heads: tuple[int, ...] = ()
) -> Mechanism:
    """Build one mechanism around or in place of `original`, or in some heads of it.

    Raises:
        SurgeryError: the mechanism's own error, or any other exception, named with mechanism, layer and slot.
        SpecError: an argument does not fit the module.
    """
    cls, config = configured(call)
    if heads:
        cls, config = SomeHeads, SomeHeadsConfig(call, heads)
    where = (
        f"`{call.name}` at {'final_norm' if context.layer is None else f'layer {context.layer}'}"
    )
    try:
        return cls(original, config, context)
    except ConfigError as error:
        if error.argument is None:
            raise
        raise SpecError(
            f"{where} `{context.slot}`: {error.message}",
            text=str(call), at=str(call).find(f"{error.argument}="), hint=error.hint,
        ) from error  # fmt: skip
    except MismatchError:
        raise
    except Exception as error:
        raise SurgeryError(
            f"{where} `{context.slot}` could not be built from {type(original).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error


def calibrators(placements: Sequence[Placement]) -> dict[tuple[int | None, str, Call], Calibrator]:
    """A fresh calibrator for each mechanism that needs inputs and outputs of the module it replaces."""
    wanted = {}
    for placement in placements:
        for call in placement.call.nested():
            cls, config = configured(call)
            calibrator = cls.calibrator(config)
            if calibrator is not None:
                wanted[_measured_at(placement, call)] = calibrator
    return wanted


def _measured_at(placement: Placement, call: Call) -> tuple[int | None, str, Call]:
    return placement.layer, HEADS if placement.heads else placement.slot, call


def _lay_out(new: nn.Module, original: nn.Module) -> None:
    """Give new tensors the memory layout that they have after loading from a file: rounding depends on it."""
    inherited = {id(t) for t in chain(original.parameters(), original.buffers())}
    for tensor in chain(new.parameters(), new.buffers()):
        if id(tensor) not in inherited and not tensor.is_contiguous():
            tensor.data = tensor.data.contiguous()
