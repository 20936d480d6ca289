"""plan.json as types: what was replaced, and how a stage's plan is read back from its file. No torch.

A plan is a frozen dataclass. It is written as JSON and read back field by field, nested dataclasses included; a file
that does not fit is an error that names the field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mismatch.errors import RunError
from mismatch.reading import typed

T = TypeVar("T")


@dataclass(frozen=True)
class Replaced:
    """One module that was replaced. Parameter dicts map a name to its number of values.

    `old` and `new` are the names of the two classes, `notes` sentences about this mechanism in this slot, `heads` the
    query heads that it took (none: all of the slot), `state_bytes` what a text's state takes at most (None: it grows
    with the text, the model's own cache holds it, or nobody counted).
    """

    layer: int | None
    slot: str
    path: str
    mechanism: str
    args: dict[str, Any]
    old: str
    new: str
    inherited: dict[str, int]
    new_parameters: dict[str, int]
    dropped: dict[str, int]
    identity: str
    state: str
    notes: tuple[str, ...]
    heads: tuple[int, ...] = ()
    state_bytes: int | None = None


@dataclass(frozen=True)
class Apart:
    """Where a student is not its teacher, found by comparing their tensors (`mismatch.surgery.compared`).

    Attributes:
        blocks: layers of the blocks that differ, swapped ones included.
        front: what stands in front of the blocks differs: the embedding, or positions.
        end: the final norm or the head differs.
    """

    blocks: tuple[int, ...]
    front: bool = False
    end: bool = False

    def text(self) -> str:
        """`the embedding, blocks 0-3, the final norm or head`; "nothing" where nothing differs."""
        runs: list[list[int]] = []
        for layer in self.blocks:
            if runs and runs[-1][-1] == layer - 1:
                runs[-1].append(layer)
            else:
                runs.append([layer])
        layers = ", ".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs)
        parts = (
            "the embedding" if self.front else "",
            f"block{'s' * bool(self.blocks[1:])} {layers}" if runs else "",
            "the final norm or head" if self.end else "",
        )
        return ", ".join(filter(None, parts)) or "nothing"


@dataclass(frozen=True, kw_only=True)
class SwapPlan:
    """What surgery did (or, on the meta device, would do), and what to know before the numbers are believed.

    `apart` is what comparing found in a student that was there before the run; None: it was swapped here, and nothing
    but the replaced modules differs.
    """

    spec: str
    clauses: tuple[Replaced, ...]
    warnings: tuple[str, ...] = ()
    apart: Apart | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with a replaced module, ascending."""
        return tuple(sorted({c.layer for c in self.clauses if c.layer is not None}))

    @property
    def first(self) -> int | None:
        """The first block that is not the teacher's own; None when all of them are."""
        if self.apart is None:
            return min(self.layers, default=None)
        return 0 if self.apart.front else min(self.apart.blocks, default=None)

    @property
    def alone(self) -> tuple[int, ...]:
        """Layers that are also run alone, on the teacher's stream: the replaced ones; of a student in which nothing
        was replaced, those that differ."""
        return self.layers if self.apart is None or self.clauses else self.apart.blocks

    @property
    def end(self) -> bool:
        """Whether the final norm or the head is not the teacher's own."""
        replaced = any(clause.layer is None for clause in self.clauses)
        return replaced or (self.apart is not None and self.apart.end)

    @property
    def front(self) -> bool:
        """Whether what stands in front of the blocks is not the teacher's own."""
        return self.apart is not None and self.apart.front


def as_json(plan: Any) -> dict[str, Any]:
    """A plan as plain values: a dataclass, or a mapping as it is."""
    return dict(plan) if isinstance(plan, Mapping) else dataclasses.asdict(plan)


def from_json(kind: type[T], data: Any, path: Path | None) -> T:
    """A plan out of plain values.

    Args:
        kind: the dataclass of the plan.
        data: what plan.json holds; a null where a float is meant is NaN, which JSON does not have.
        path: of the file, for the error.

    Raises:
        RunError: a field is missing or of another type; the message names it.
    """
    return typed(
        kind,
        data,
        lambda reason: RunError(
            f"{path or 'the plan'} is not the plan of such a run: {reason}",
            hint="the file was changed by hand, or made by another version of mismatch",
        ),
    )
