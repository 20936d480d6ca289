"""plan.json of a scan. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from mismatch.stages.scan.unit_sums import UnitSums


@dataclass(frozen=True)
class ColumnPlan:
    """A mechanism of a scan: whether it is a control, and the controls it is compared with."""

    name: str
    control: bool
    controls: tuple[str, ...]


@dataclass(frozen=True)
class TaskPlan:
    """A task: its sequences and what of them is scored; the reading of text is kl.

    Attributes:
        scored: predictions that are compared.
        documents: units of the interval: documents, sequences or prompts.
        rows, length: sequences and tokens of each.
        reading: what the table calls it.
        chance: log-loss of a model that knows nothing, nats; None: text, of which that is not asked.
    """

    scored: int
    documents: int
    chance: float | None
    rows: int = 0
    length: int = 0
    reading: str = "kl"


class HasTasks(Protocol):
    """The plan of a scan or of a choice."""

    @property
    def tasks(self) -> Mapping[str, TaskPlan]: ...


@dataclass(frozen=True, kw_only=True)
class ScanPlan:
    """What was scanned, and what was left out with the reason; `by` layer, head or kv-head.

    `units` holds, by task, what each cell lost in each document or prompt: how sure a ranking is comes from it.
    """

    model: str
    columns: tuple[ColumnPlan, ...]
    layers: tuple[int, ...]
    n_layers: int
    tasks: dict[str, TaskPlan]
    notes: tuple[str, ...]
    by: str = "layer"
    units: dict[str, UnitSums] = field(default_factory=dict)
