"""Arguments that were set after a mechanism was built: written into the student's plan, and into what it saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from mismatch import spec
from mismatch.mechanisms.base import Mechanism
from mismatch.runs.plan import Replaced
from mismatch.spec.clauses import Value
from mismatch.spec.rewriting import with_argument
from mismatch.surgery import saving
from mismatch.surgery.operate import Student, resolved


def rewrite(student: Student, name: str, values: Mapping[int, Value]) -> None:
    """Record that an argument has another value than the swap said, in some layers.

    A checkpoint is rebuilt from the text of its swap: without this it would come back with the old value.

    Args:
        student: whose mechanisms have the value already.
        name: of the argument.
        values: by layer.
    """
    model = student.model
    if isinstance(model, saving.Swapped):
        swaps = tuple(
            replace(swap, text=_text(student, swap.text, name, values))
            for swap in model.swap_record.swaps
        )
        model.swap_record = replace(model.swap_record, swaps=swaps)
    text = _text(student, student.plan.spec, name, values)
    calls = {
        (placement.layer, placement.slot, placement.heads, placement.call.name): placement.call
        for placement in resolved(spec.parse(text), student.layout)
    }
    clauses = tuple(
        _again(
            clause, calls.get((clause.layer, clause.slot, clause.heads, clause.mechanism)), model
        )
        if clause.layer in values
        else clause
        for clause in student.plan.clauses
    )
    student.plan = replace(student.plan, spec=text, clauses=clauses)


def _text(student: Student, text: str, name: str, values: Mapping[int, Value]) -> str:
    parsed = spec.parse(text)
    return spec.format(with_argument(parsed, resolved(parsed, student.layout), name, values))


def _again(clause: Replaced, call: spec.Call | None, model: nn.Module) -> Replaced:
    module = model.get_submodule(clause.path)
    if call is None or not isinstance(module, Mechanism):
        return clause
    there = dict(module.named_parameters())
    return replace(
        clause,
        args=call.printable(),
        new_parameters={n: count for n, count in clause.new_parameters.items() if n in there},
        notes=tuple(module.notes()),
        state_bytes=module.state_bytes(),
    )
