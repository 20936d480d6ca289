"""From the cells of a scan to a choice of layers.

    minimise    sum x cost                  x = 1: this mechanism goes into this layer
    subject to  sum x = layers              (or: as many as possible, then as cheap as possible)
                at most one mechanism a layer
                sum x KL <= budget_kl
                sum x max(lost, 0) <= budget_retrieval

solved exactly by `scipy.optimize.milp` (HiGHS). The cost is the KL, or another score (`scores.py`). What a layer gains
on retrieval pays for no other in a budget: one key found better does not find another one. That costs add up is an
assumption, and the evaluation shows how wrong it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from mismatch.errors import UsageError
from mismatch.report.style import number


@dataclass(frozen=True)
class Score:
    """One cell of a scan.

    Attributes:
        layer, mechanism: which.
        kl: what it costs on text, nats per token; nan where the score did not ask for that.
        lost: what the passkey loses, nats per key; 0 when it was not asked for.
        cost: what the choice adds up; None: the KL.
    """

    layer: int
    mechanism: str
    kl: float
    lost: float = 0.0
    cost: float | None = None

    @property
    def price(self) -> float:
        """What the choice adds up."""
        return self.kl if self.cost is None else self.cost

    @property
    def charged(self) -> float:
        """What counts against the budget of retrieval."""
        return max(self.lost, 0.0)


def choose(
    scores: Sequence[Score],
    layers: int | None,
    *,
    budget_kl: float | None = None,
    budget_lost: float | None = None,
) -> tuple[Score, ...]:
    """The cheapest choice, ascending by layer.

    Args:
        scores: the cells.
        layers: how many; None: as many as the budgets allow.
        budget_kl: most that the sum of KL may be.
        budget_lost: most that the passkey may lose in sum; None: not looked at.

    Raises:
        UsageError: there is no such choice; says what the least would be.
    """
    scores = sorted(scores, key=lambda s: (s.layer, s.price, s.mechanism))
    enough(layers, {s.layer for s in scores}, [s.mechanism for s in scores])
    found = _solve(scores, [s.price for s in scores], layers, budget_kl, budget_lost)
    if not found:
        raise UsageError(
            f"no choice of {'a layer' if layers is None else _count(layers)} stays within "
            f"{_budgets(budget_kl, budget_lost)}",
            hint=_least(scores, layers or 1, budget_kl, budget_lost),
        )
    return found


def enough(layers: int | None, there: Collection[int | None], mechanisms: Iterable[str]) -> None:
    """Whether as many layers can hold a mechanism as were asked for.

    Raises:
        UsageError: they cannot.
    """
    if layers is not None and layers > (most := len(there)):
        names = " or ".join(dict.fromkeys(mechanisms)) or "nothing"
        raise UsageError(
            f"{_count(layers)} asked for, and {most} can hold {names}",
            hint=f"take --layers {most} or fewer, or widen --among" if most else "widen --among",
        )


def _solve(
    scores: Sequence[Score],
    prices: Sequence[float],
    layers: int | None,
    budget_kl: float | None,
    budget_lost: float | None,
) -> tuple[Score, ...] | None:
    places = sorted({s.layer for s in scores})
    once = np.array([[s.layer == place for s in scores] for place in places], float)
    rules = [LinearConstraint(once, -np.inf, 1.0)]
    for budget, costs in (
        (budget_kl, [s.kl for s in scores]),
        (budget_lost, [s.charged for s in scores]),
    ):
        if budget is not None:
            unit = budget or 1.0
            rules.append(LinearConstraint(np.array(costs) / unit, -np.inf, budget / unit))
    ones = np.ones(len(scores))
    if layers is None:
        most = _least_sum(-ones, rules)
        layers = 0 if most is None else int(most.sum())
    found = _least_sum(
        _of_size_one(np.array(prices)), [*rules, LinearConstraint(ones, layers, layers)]
    )
    return None if found is None else tuple(s for s, x in zip(scores, found, strict=True) if x)


def _least_sum(cost: np.ndarray, rules: Sequence[LinearConstraint]) -> np.ndarray | None:
    """Bool, which to take; None: nothing keeps the rules."""
    options = {"mip_rel_gap": 0.0}
    ones = np.ones_like(cost)
    x = milp(cost, integrality=ones, bounds=Bounds(0, 1), constraints=rules, options=options).x
    return None if x is None else np.asarray(x > 0.5)


def _of_size_one(prices: np.ndarray) -> np.ndarray:
    """In units of the middle one: the solver calls a choice the best that is within 1e-6 of it."""
    sizes = np.abs(prices[prices != 0])
    return prices / np.median(sizes) if len(sizes) else prices


def _least(
    scores: Sequence[Score], layers: int, budget_kl: float | None, budget_lost: float | None
) -> str:
    """What would have to be given up."""
    words, kl = [], [s.kl for s in scores]
    if budget_kl is not None and (found := _solve(scores, kl, layers, None, budget_lost)):
        words.append(f"the least KL is {number(sum(s.kl for s in found))}")
    if budget_lost is not None and (found := _solve(scores, kl, layers, budget_kl, None)):
        least = sum(s.charged for s in found)
        words.append(f"without a budget of retrieval the passkey would lose {number(least)}")
    if not words and (found := _solve(scores, kl, layers, None, None)):
        words.append(f"without budgets the least KL is {number(sum(s.kl for s in found))}")
    return f"for {_count(layers)} " + "; ".join(words)


def _count(layers: int) -> str:
    return f"{layers} layer{'s' if layers > 1 else ''}"


def _budgets(budget_kl: float | None, budget_lost: float | None) -> str:
    said = [
        *([] if budget_kl is None else [f"a KL of {number(budget_kl)}"]),
        *([] if budget_lost is None else [f"a loss of the passkey of {number(budget_lost)}"]),
    ]
    return " and ".join(said) or "the layers there are"
