"""Students that bound the scale: the same slots as the swap, holding `zero`, `mean`, ... instead.

A shift means something only beside what deleting the part costs, on the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from mismatch import registry, spec
from mismatch.surgery.operate import Plan


def control_specs(controls: Sequence[str], plan: Plan) -> dict[str, spec.Spec]:
    """The swap text of each control, in the very slots of the swap.

    Args:
        controls: names of mechanisms.
        plan: of the swap.
    """
    places: dict[str, set[int | None]] = {}
    for clause in plan.clauses:
        places.setdefault(clause.slot, set()).add(clause.layer)
    return {control: spec.parse(_clauses(control, places)) for control in controls}


def _clauses(control: str, places: dict[str, set[int | None]]) -> list[str]:
    slots = registry.mechanisms().card(control).facts["slots"]
    found: dict[str, None] = {}
    for slot, layers in places.items():
        # A control that cannot stand in this slot (skip, in attention) stands in its own: the block around it.
        own = slot if slot in slots else slots[0]
        if None in layers:
            found[f"final_norm:{control}"] = None
        if named := sorted(layer for layer in layers if layer is not None):
            found[f"layers[{','.join(map(str, named))}].{own}:{control}"] = None
    return list(found)
