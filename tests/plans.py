"""Plans for tests: made with every field filled in, and written and read back as a run folder does it."""

from __future__ import annotations

import json
from typing import Any

from mismatch.runs.files import json_text
from mismatch.runs.plan import Replaced, as_json, from_json
from mismatch.stages.scan.plan import ScanPlan, TaskPlan


def replaced(mechanism: str, slot: str = "attn", layer: int | None = 2, **fields: Any) -> Replaced:
    """One replaced module; what is not given holds nothing."""
    empty: dict[str, Any] = {
        "path": f"model.layers.{layer}.{slot}",
        "args": {},
        "old": "Old",
        "new": "New",
        "inherited": {},
        "new_parameters": {},
        "dropped": {},
        "identity": "never",
        "state": "none",
        "notes": (),
    }
    return Replaced(layer, slot, mechanism=mechanism, **(empty | fields))


def task_plan(chance: float | None) -> TaskPlan:
    """A task with this log-loss of a model that knows nothing, nats."""
    return TaskPlan(scored=10, documents=2, chance=chance, rows=2, length=64, reading="logprob")


def scan_plan(**fields: Any) -> ScanPlan:
    """What was scanned: four layers of a model; what is not given holds nothing."""
    empty: dict[str, Any] = {
        "model": "toy",
        "columns": (),
        "layers": (0, 1, 2, 3),
        "n_layers": 4,
        "tasks": {},
        "notes": (),
    }
    return ScanPlan(**(empty | fields))


def read_back(plan: Any) -> Any:
    """A plan through the text of its plan.json."""
    return from_json(type(plan), json.loads(json_text(as_json(plan))), None)
