"""Scores of cells from what a scan keeps, alike from its numbers and from the same numbers drawn again. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mismatch.stages.plan.choose import Score
from mismatch.stages.plan.scores import SCORES
from mismatch.stages.scan.plan import ScanPlan
from mismatch.stages.scan.unit_sums import UnitSums

TINY = 1e-10
"""In the denominator of HALO's ratio, as published."""


@dataclass(frozen=True)
class Costs:
    """Float64 `... cells` each: nats per token of text, per key of the passkey, per answer token."""

    kl: np.ndarray
    lost: np.ndarray
    answers: np.ndarray

    def prices(self, score: str) -> np.ndarray:
        """What a score adds up, `... cells`."""
        if score != "halo":
            return self.answers if score == "answer_nll" else self.kl
        more, less = (cost - cost.min(-1, keepdims=True) for cost in (self.answers, self.kl))
        ratio: np.ndarray = more / (less + TINY)
        return ratio

    def __getitem__(self, draw: int) -> Costs:
        return Costs(self.kl[draw], self.lost[draw], self.answers[draw])


@dataclass(frozen=True)
class Numbers:
    """What the cells of a scan lost, of the tasks that matter here.

    Attributes:
        cells: mechanism and layer of each, by its key.
        units: by task: text, the passkey where it was asked, and `able`.
        able: tasks of answers that the model can do.
        digits: scored tokens of a key.
    """

    cells: dict[str, tuple[str, int]]
    units: dict[str, UnitSums]
    able: tuple[str, ...] = ()
    digits: float = 0.0

    @classmethod
    def of(
        cls, plan: ScanPlan, names: Collection[str], layers: Collection[int], able: Sequence[str]
    ) -> Numbers:
        """The cells that may be chosen: finite on all of these tasks."""
        units = {
            task: found
            for task, found in plan.units.items()
            if task in ("text", "passkey") or task in able
        }
        places = {f"{name}@{layer}": (name, layer) for name in names for layer in layers}
        cells = {
            key: place
            for key, place in places.items()
            if all(key in found.sums for found in units.values())
        }
        key = plan.tasks.get("passkey")
        return cls(cells, units, tuple(able), 0.0 if key is None else key.scored / key.rows)

    def over(self, score: str, budget: bool = False) -> str | None:
        """What a choice by this score would be drawn again over; None: too few documents or prompts.

        Args:
            score: that ranks.
            budget: whether the passkey has one.
        """
        tasks = {"answer_nll": self.able, "halo": ("text", *self.able)}.get(score, ("text",))
        used = [self.units[task] for task in (*tasks, *(["passkey"] if budget else []))]
        if not all(found.enough for found in used):
            return None
        return " and ".join(dict.fromkeys(found.over for found in used))

    def costs(self) -> Costs:
        """As measured, `cells`."""
        return self._costs({task: found.means([*self.cells]) for task, found in self.units.items()})

    def drawn(self, seed: int) -> Costs:
        """On documents and prompts drawn again, `draws cells`."""
        return self._costs(
            {
                task: found.drawn([*self.cells], seed + at)
                for at, (task, found) in enumerate(self.units.items())
            }
        )

    def _costs(self, means: Mapping[str, np.ndarray]) -> Costs:
        kl = means["text"]
        none = np.zeros_like(kl)
        answers = np.mean([means[task] for task in self.able] or [none], axis=0)
        return Costs(kl, self.digits * means.get("passkey", none), answers)

    def scores(self, costs: Costs, score: str) -> list[Score]:
        """Each cell with its price."""
        known = SCORES[score].scanned
        return [
            Score(
                layer,
                name,
                float(kl) if known else math.nan,
                float(lost),
                None if score == "kl" else float(price),
            )
            for (name, layer), kl, lost, price in zip(
                self.cells.values(), costs.kl, costs.lost, costs.prices(score), strict=True
            )
        ]


def spaced(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """So many of the layers, as evenly spaced as can be: the middles of equal parts."""
    return tuple(layers[int((at + 0.5) * len(layers) / count)] for at in range(count))


def at_random(layers: Sequence[int], count: int, seed: int) -> tuple[int, ...]:
    """So many of the layers, drawn."""
    draw = np.random.default_rng([seed, count])
    return tuple(sorted(draw.choice(layers, count, replace=False).tolist()))
