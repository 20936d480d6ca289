"""Held-out text of a diagnosis: beside the teacher's stream and final states, what the teacher adds at the places, and
how far the swap's stream behind them is from the teacher's. Corrected students are evaluated on it as any other is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mismatch.forward import hooks
from mismatch.forward.heldout import HeldOut
from mismatch.forward.shared_prefix import Stored
from mismatch.forward.sites import Tap, leaving
from mismatch.models.layout import Layout
from mismatch.stages.diagnose.forced import Side, teacher_sides
from mismatch.stages.diagnose.places import Place
from mismatch.texts.windows import Windows


@dataclass(frozen=True)
class Behind:
    """How far the student's stream is from the teacher's, `||s - t|| / ||t||`, mean over tokens, by layer."""

    layers: tuple[int, ...]
    errors: tuple[float, ...]


class CorrectedHeldOut(HeldOut):
    """A text with the teacher's side of it, the places included.

    Args:
        teacher: layout.
        places: the swapped places.
        windows: of held-out text.
        first: the student's first block that is not the teacher's own.
        batch_size: windows per forward.
        scored: share of the tokens whose predictions are compared.
        seed: of which.
        student: whose stream behind the places is compared on the way.
        complete: adds to the sides what only others know.
        progress: told after each run of a model over a batch.

    Attributes:
        sides: of each batch, by place.
        behind: of the student.
    """

    def __init__(
        self,
        teacher: Layout,
        places: Sequence[Place],
        windows: Windows,
        first: int,
        *,
        batch_size: int,
        scored: float,
        seed: int,
        student: Layout,
        complete: Callable[[Tensor, dict[Place, Side]], None],
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.places, self.last = places, places[-1].layer
        self.student, self.complete = student, complete
        self.sides: list[dict[Place, Side]] = []
        self._apart = torch.zeros(teacher.n_layers - self.last, dtype=torch.float64)
        super().__init__(
            teacher,
            windows,
            first,
            batch_size,
            scored=scored,
            seed=seed,
            progress=progress,
        )
        layers = tuple(range(self.last, teacher.n_layers))
        self.behind = Behind(layers, tuple((self._apart / windows.tokens).tolist()))

    def run_teacher(self, ids: Tensor) -> tuple[Tensor, Stored[int]]:
        sides, final, theirs = teacher_sides(
            self.teacher, self.places, ids, whole=True, behind=self.last, entering=self.first
        )
        self.complete(ids, sides)
        self.sides.append(sides)
        streams: Stored[int] = Stored()
        if self.first > 0:
            streams.keep(self.first, theirs[self.first - 1])

        def compare(tap: Tap, value: Tensor) -> None:
            t = theirs[tap.layer].to(value.device)
            error = (value - t).norm(dim=-1) / t.norm(dim=-1)
            self._apart[tap.layer - self.last] += error.double().sum().cpu()

        wanted = [leaving(layer) for layer in range(self.last, self.student.n_layers)]
        entering = streams.get(self.first)
        hooks.run(self.student, ids, wanted, compare, start=self.first, stream=entering)
        return final, streams
