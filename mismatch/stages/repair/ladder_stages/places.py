"""Stages that go from place to place, and how several ranks share them.

order joint        every place reads the teacher's stream, so none needs another: rank r of w takes places
                   r, r + w, ... alone, and what it trained is copied to the others. The same bits as one process
order sequential,  the next place reads what this one gives: the ranks go through the places together, and share the
or one place       batches of each. The same up to the order of additions
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import Tensor

from mismatch.runs.ranks import ALONE, Ranks
from mismatch.stages.repair.ladder_stages.stage_result import StageResult

if TYPE_CHECKING:
    from mismatch.stages.repair.ladder import Ladder

Place = TypeVar("Place")


@dataclass(frozen=True)
class Places(Generic[Place]):
    """The places of one stage.

    Attributes:
        every: of them, in the order of the ladder.
        ranks: who works on them.
        apart: whether each rank takes its own.
    """

    every: Sequence[Place]
    ranks: Ranks
    apart: bool

    @classmethod
    def of(cls, ladder: Ladder, every: Sequence[Place]) -> Places[Place]:
        joint = ladder.config.order == "joint" and len(every) > 1
        return cls(every, ladder.ranks, joint and ladder.ranks.world > 1)

    @property
    def together(self) -> Ranks:
        """Who shares the work of one place."""
        return ALONE if self.apart else self.ranks

    @property
    def turns(self) -> int:
        """Places that a rank works on, one after the other."""
        return max(1, -(-len(self.every) // (self.ranks.world if self.apart else 1)))

    def run(
        self,
        stage: StageResult,
        work: Callable[[StageResult, int, Place], None],
        tensors: Callable[[Place], Iterable[Tensor]],
    ) -> StageResult:
        """Work on every place.

        Args:
            stage: what was done is added to it.
            work: on one place, given its number; with the ranks `together`.
            tensors: of the student, that the work on a place changes.
        """

        def one(at: int) -> StageResult:
            own = StageResult(stage.name)
            work(own, at, self.every[at])
            return own

        numbers = range(len(self.every))
        if not self.apart:
            stage.add([one(at) for at in numbers])
            return stage
        found = self.ranks.shared(numbers, one)
        for at in numbers:
            self.ranks.copied(tensors(self.every[at]), source=at % self.ranks.world)
        stage.add(found, self.ranks.world)
        return stage
