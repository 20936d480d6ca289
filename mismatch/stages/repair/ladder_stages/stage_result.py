"""What one stage of the repair ladder did, as it is saved, reported and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mismatch.report.intervals import band

if TYPE_CHECKING:
    from mismatch.stages.repair.ladder_stages.training import Trained


@dataclass(frozen=True)
class Look:
    """One look at held-out windows during training."""

    step: int
    tokens: int
    seconds: float
    error: float
    gates: dict[str, list[float]] = field(default_factory=dict)
    """Tensors of the gate groups as they were then, by name, the small ones."""


@dataclass
class StageResult:
    """One stage as run. KL in nats per token on the evaluation text; errors relative; `retrieval` is the NLL of answers
    minus the teacher's, nats per token, over so many tokens of `answers`: 0 and NaN where it is not judged."""

    name: str
    where: str = ""
    kl: float = float("nan")
    lo: float = float("nan")
    hi: float = float("nan")
    nll: float = float("nan")
    gap_closed: float = float("nan")
    gap_lo: float = float("nan")
    gap_hi: float = float("nan")
    retrieval: float = float("nan")
    retrieval_lo: float = float("nan")
    retrieval_hi: float = float("nan")
    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    kept: bool = True
    looks: list[Look] = field(default_factory=list)
    gates: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    slots: dict[str, list[int]] = field(default_factory=dict)
    """Slots of each kv head by layer, where the stage shared them out."""

    def add(self, places: Sequence[StageResult | Trained], ranks: int = 1) -> None:
        """What was done at each place, in their order; each of several ranks did its own, at the same time."""
        for one in places:
            self.tokens += one.tokens
            self.steps += one.steps
            self.looks += one.looks
            self.gates |= one.gates
            self.notes += one.notes
        turns = [places[rank::ranks] for rank in range(ranks)]
        self.seconds += max(sum(one.seconds for one in own) for own in turns)

    @property
    def retrieval_words(self) -> str:
        """`retrieval +0.12 [0.02, 0.22] nats`; "" where it is not judged."""
        if not self.answers:
            return ""
        between = band(self.retrieval_lo, self.retrieval_hi, "{:+.2f}".format)
        return f"retrieval {self.retrieval:+.2f} {between} nats"
