"""A swap with other arguments in some of its layers: what a measurement chose, written as text again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mismatch.registry import mechanisms
from mismatch.spec.clauses import Call, Clause, Range, Spec, Value
from mismatch.spec.placement import Placement, check


def with_argument(
    spec: Spec, placements: Sequence[Placement], name: str, values: Mapping[int, Value]
) -> Spec:
    """The swap with an argument set, layer by layer.

    Args:
        spec: from `parse`.
        placements: from `resolve`, of the same spec.
        name: of the argument; every mechanism of the layer that has it gets it, nested ones too.
        values: by layer. A clause over several layers becomes a clause for each; the others stay as they are.

    Raises:
        SpecError: as `check`, of the result.
    """
    clauses: list[Clause] = []
    for index, clause in enumerate(spec.clauses):
        takes = any(mechanisms().card(call.name).arg(name) for call in clause.call.nested())
        layers = [p.layer for p in placements if p.clause_index == index and p.layer in values]
        if not takes or not layers:
            clauses.append(clause)
            continue
        for layer in layers:
            assert layer is not None  # it is a key of `values`
            target = replace(clause.target, kind="layers", ranges=(Range(layer, layer),))
            clauses.append(Clause(target, _set(clause.call, name, values[layer])))
    return check(Spec(tuple(clauses), spec.text))


def _set(call: Call, name: str, value: Value) -> Call:
    args = [
        (key, _set(old, name, value) if isinstance(old, Call) else old)
        for key, old in call.args
        if key != name
    ]
    if mechanisms().card(call.name).arg(name):
        args.append((name, value))
    return replace(call, args=tuple(args), columns=((0, 0),) * len(args))
