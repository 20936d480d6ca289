"""Layers (or heads) x mechanisms: the columns of a scan, its cells, and which of them cannot be built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mismatch import registry, spec
from mismatch.errors import LayoutError, SurgeryError
from mismatch.models.layout import Layout
from mismatch.spec import Call, Placement, Template
from mismatch.stages.scan.config import HEADS_OF
from mismatch.surgery import operate as surgery
from mismatch.surgery.operate import placed


@dataclass(frozen=True)
class Column:
    """One mechanism of a scan, and the controls that stand in its slot."""

    template: Template
    controls: tuple[str, ...] = ()
    control: bool = False
    """It bounds the scale of others."""

    @property
    def name(self) -> str:
        """What the table calls it: `infini(segment=64)`, or `mlp:zero` where the slot was named."""
        return str(self.template)


@dataclass(frozen=True)
class Cell:
    """One student: what is replaced, from which block on it differs, and where the table puts it.

    Attributes:
        name: of the student in the table.
        layer: the swapped layer; None for a swap of several.
        placements: what goes where; none: in a base with parts replaced, the layer is given back.
        first: the first swapped block.
        head: the swapped head, or kv head; None: the whole layer.
    """

    name: str
    layer: int | None
    placements: tuple[Placement, ...]
    first: int
    head: int | None = None

    @property
    def where(self) -> str:
        """`layer 18`, `layer 18 head 2`."""
        return f"layer {self.layer}" + ("" if self.head is None else f" head {self.head}")

    @property
    def key(self) -> str:
        """Names the cell in a saved state."""
        where = "joint" if self.layer is None else str(self.layer)
        return f"{self.name}@{where}{'' if self.head is None else f'.{self.head}'}"


def columns(templates: Sequence[Template], controls: Sequence[str]) -> tuple[Column, ...]:
    """The mechanisms, then the controls in each of their slots.

    A mechanism that is also a control of another (`zero` beside `infini`) is one column.
    """
    bounds: dict[str, dict[str, Template]] = {}
    for template in templates:
        for control in controls:
            found = control_of(template, control)
            if str(found) != str(template):
                bounds.setdefault(str(template), {})[str(found)] = found
    names = {str(template) for template in templates}
    added = {name: t for found in bounds.values() for name, t in found.items() if name not in names}
    asked = [
        Column(t, tuple(bounds.get(str(t), {})), any(str(t) in b for b in bounds.values()))
        for t in templates
    ]
    return (*asked, *(Column(template, (), True) for template in added.values()))


def control_of(template: Template, control: str) -> Template:
    """A control in the slot of a mechanism.

    Positions enter in attention, so what bounds their loss is the loss of all of it. A control that cannot stand in a
    slot (skip, in attention) stands in its own. Zeros in place of a block would delete the stream with it: what the
    block adds is deleted instead.
    """
    known = registry.mechanisms()
    allowed = known.card(template.call.name).facts.get("slots", ("attn",))
    own = template.slot or allowed[0]
    own = "attn" if own == "rope" else own
    if own == "block" and control == "zero":
        control = "skip"
    slots = known.card(control).facts["slots"]
    return Template(Call(control), own if own in slots and own != slots[0] else None, control)


def cells(
    columns: Iterable[Column], layers: Iterable[int], layout: Layout, by: str = "layer"
) -> tuple[Cell, ...]:
    """Every column at every layer (or head), layer by layer: the order in which streams can be let go.

    Args:
        columns: mechanisms and controls.
        layers: 0-based.
        layout: of the model.
        by: "layer", "head" or "kv-head".

    Raises:
        SpecError: a slot that this family of models does not have; a control that cannot take heads.
    """
    columns, kind = tuple(columns), HEADS_OF.get(by, "")
    count = {"head": layout.n_heads, "kv-head": layout.n_kv_heads}.get(by)
    return tuple(
        Cell(column.name, layer, placed(column.template.at(layer, kind, head), layout), layer, head)
        for layer in layers
        for head in (range(count) if count else (None,))
        for column in columns
    )


def joint(name: str, parsed: spec.Spec, layout: Layout) -> Cell:
    """One student with all that a swap says."""
    placements = placed(parsed, layout)
    first = min(p.layer for p in placements if p.layer is not None)
    return Cell(name, None, placements, first)


def refused(cells: Sequence[Cell], skeleton: Layout) -> dict[Cell, str]:
    """The cells that cannot be built in this model, with the reason; built on the meta device.

    Raises:
        LayoutError, SurgeryError: of a mechanism that has no slot, or cannot be built, in any layer.
    """
    bench = surgery.blank(skeleton)
    errors: dict[Cell, LayoutError | SurgeryError] = {}
    for cell in cells:
        try:
            with surgery.holding(bench, cell.placements):
                pass
        except (LayoutError, SurgeryError) as error:
            errors[cell] = error
    for name in {cell.name for cell in errors}:
        mine = [cell for cell in cells if cell.name == name]
        if all(cell in errors for cell in mine):
            raise errors[mine[0]]
    return {cell: error.message for cell, error in errors.items()}


def calibrators(cells: Iterable[Cell]) -> dict:
    """A fresh calibrator for each mechanism of these cells that wants one."""
    return surgery.calibrators([p for cell in cells for p in cell.placements])
