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
    cost, ones = np.array(prices), np.ones(len(scores))
    if layers is None:  # one more of them is worth more than all the cost there is
        cost = cost / (2 * np.abs(cost).sum() + 1e-12) - 1.0
    places = sorted({s.layer for s in scores})
    once = np.array([[s.layer == place for s in scores] for place in places], float)
    rules = [LinearConstraint(once, -np.inf, 1.0)]
    if layers is not None:
        rules.append(LinearConstraint(ones, layers, layers))
    if budget_kl is not None:
        rules.append(LinearConstraint([s.kl for s in scores], -np.inf, budget_kl))
    if budget_lost is not None:
        rules.append(LinearConstraint([s.charged for s in scores], -np.inf, budget_lost))
    solved = milp(
        cost, integrality=ones, bounds=Bounds(0, 1), constraints=rules, options={"mip_rel_gap": 0.0}
    )
    if solved.x is None:
        return None
    return tuple(s for s, x in zip(scores, solved.x, strict=True) if x > 0.5)


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
