"""Controls: students with `zero`, `mean`, ... in the slots of the swap, or in its heads. They bound the scale.

A shift is read beside the cost of deleting the module, on the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from mismatch import registry, spec
from mismatch.runs.plan import SwapPlan
from mismatch.spec.heads import named


def control_specs(controls: Sequence[str], plan: SwapPlan) -> dict[str, spec.Spec]:
    """The swap text of each control, in the slots of the swap.

    Args:
        controls: names of mechanisms.
        plan: of the swap; a student in which nothing was swapped has no slot for a control.
    """
    if not plan.clauses:
        return {}
    layers: dict[str, set[int | None]] = {}
    heads: dict[int | None, set[int]] = {}
    for clause in plan.clauses:
        if clause.heads:
            heads.setdefault(clause.layer, set()).update(clause.heads)
        else:
            layers.setdefault(clause.slot, set()).add(clause.layer)
    return {control: spec.parse(_clauses(control, layers, heads)) for control in controls}


def _clauses(
    control: str, by_slot: dict[str, set[int | None]], by_layer: dict[int | None, set[int]]
) -> list[str]:
    facts = registry.mechanisms().card(control).facts
    slots, by_slot = facts["slots"], {slot: set(layers) for slot, layers in by_slot.items()}
    found: dict[str, None] = {}
    for layer, heads in by_layer.items():
        if layer in by_slot.get("attn", ()):
            continue  # something stands around all of its heads
        if facts.get("heads"):
            found[f"layer{layer}.heads[{named(sorted(heads))}]:{control}"] = None
        else:
            by_slot.setdefault("attn", set()).add(layer)
    for slot, layers in by_slot.items():
        # A control that cannot go into this slot (skip, in attention) goes into its own: the block around it.
        own = slot if slot in slots else slots[0]
        if None in layers:
            found[f"final_norm:{control}"] = None
        if inside := sorted(layer for layer in layers if layer is not None):
            found[f"layers[{','.join(map(str, inside))}].{own}:{control}"] = None
    return list(found)
