"""What one rung of the ladder did, as it is saved, reported and drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Rung:
    """One rung as it ran. KL in nats per token on the evaluation text; errors relative."""

    name: str
    where: str = ""
    kl: float = float("nan")
    lo: float = float("nan")
    hi: float = float("nan")
    nll: float = float("nan")
    gap_closed: float = float("nan")
    gap_lo: float = float("nan")
    gap_hi: float = float("nan")
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    kept: bool = True
    looks: list[dict[str, float]] = field(default_factory=list)
    gates: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
