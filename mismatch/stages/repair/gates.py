"""Where the gates of swapped parts stand: numbers that weigh branches, one a head, and others that scale or forget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mismatch.mechanisms.base import Mechanism
from mismatch.stages.repair.ladder_stages.local import GATES
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair
from mismatch.stages.repair.ladder_stages.training import DRAWN


def standing(parts: Sequence[ModulePair]) -> dict[str, list[float]]:
    """The gates of every part as they are now, by the name that training gives them; at most `DRAWN` numbers each."""
    return {
        f"{part.where}.{name}": parameter.detach().float().flatten().tolist()
        for part in parts
        for name, parameter in part.student.named_parameters()
        if name.split(".")[-1] in GATES and parameter.numel() <= DRAWN
    }


def weighing(parts: Sequence[ModulePair]) -> dict[str, str]:
    """Of the gates that weigh a branch by their sigmoid, the name of the branch."""
    found: dict[str, str] = {}
    for part in parts:
        names: dict[Any, str] = {id(p): n for n, p in part.student.named_parameters()}
        for module in part.student.modules():
            if isinstance(module, Mechanism):
                for branch, gate in module.gates().items():
                    found[f"{part.where}.{names[id(gate)]}"] = branch
    return found
