"""How sure a ranking of layers is, and how much two choices agree beside what chance alone gives. No torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import hypergeom

ENDS = (2.5, 97.5)
"""Percentiles of the ranks in all draws."""


@dataclass(frozen=True)
class Ranked:
    """One place of a ranking.

    Attributes:
        place: the layer.
        rank: 1 is the cheapest.
        lo, hi: 95 % of the draws give it a rank between these.
        chosen: share of the draws in which it is chosen.
    """

    place: int
    rank: int
    lo: int
    hi: int
    chosen: float


@dataclass(frozen=True)
class Reliability:
    """What other documents and prompts would have chosen.

    Attributes:
        over: what was drawn again.
        draws: how often.
        same: share of the draws that choose the very same set.
        kept: how many of the chosen a draw chooses again, on average.
        ranks: of every place, the cheapest first.
    """

    over: str
    draws: int
    same: float
    kept: float
    ranks: tuple[Ranked, ...]

    @property
    def sure(self) -> tuple[int, ...]:
        """Places that at least 95 % of the draws choose."""
        return tuple(one.place for one in self.ranks if one.chosen >= 0.95)


@dataclass(frozen=True)
class Overlap:
    """What two sets out of `of` share.

    Attributes:
        shared: in both.
        sizes: of the two sets.
        of: all there are.
    """

    shared: int
    sizes: tuple[int, int]
    of: int

    @classmethod
    def between(cls, one: Collection[int], other: Collection[int], of: int) -> Overlap:
        """Two sets of layers of a model with `of` layers to choose from."""
        return cls(len(set(one) & set(other)), (len(set(one)), len(set(other))), of)

    @property
    def chance(self) -> float:
        """What two sets of these sizes share on average when they are drawn at random."""
        return self.sizes[0] * self.sizes[1] / self.of

    @property
    def p(self) -> float:
        """How often sets drawn at random share at least as much: hypergeometric."""
        return float(hypergeom.sf(self.shared - 1, self.of, *self.sizes))

    def text(self) -> str:
        """`share 3 of 8; chance 2.1, p = .38`."""
        less = min(self.sizes)
        p = "p < .001" if self.p < 0.001 else f"p = {self.p:.3f}".replace("0.", ".")
        return f"share {self.shared} of {less}; chance {self.chance:.1f}, {p}"


def reliability(
    places: Sequence[int],
    prices: np.ndarray,
    drawn: np.ndarray,
    chosen: Collection[int],
    again: Sequence[Collection[int] | None],
    over: str,
) -> Reliability:
    """How sure a choice is.

    Args:
        places: the layers that could be chosen.
        prices: float `places`: what ranks them, the cheapest first.
        drawn: float `draws places`: the same, drawn again.
        chosen: the set.
        again: the set of each draw; None where a draw allows none.
        over: what was drawn.
    """
    ranks = drawn.argsort(1, kind="stable").argsort(1) + 1
    lo, hi = np.percentile(ranks, ENDS, axis=0)
    sets = [frozenset(found or ()) for found in again]
    order = np.argsort(prices, kind="stable")
    return Reliability(
        over=over,
        draws=len(drawn),
        same=sum(found == frozenset(chosen) for found in sets) / len(sets),
        kept=sum(len(found & set(chosen)) for found in sets) / len(sets),
        ranks=tuple(
            Ranked(
                place=places[at],
                rank=rank,
                lo=int(np.floor(lo[at])),
                hi=int(np.ceil(hi[at])),
                chosen=sum(places[at] in found for found in sets) / len(sets),
            )
            for rank, at in enumerate(order.tolist(), 1)
        ),
    )


def cheapest(places: Sequence[int], prices: np.ndarray, count: int) -> tuple[int, ...]:
    """So many places of the lowest price, ascending."""
    return tuple(sorted(places[at] for at in np.argsort(prices, kind="stable")[:count].tolist()))


def overlaps(sets: dict[str, Collection[int]], of: int) -> list[tuple[str, str, Overlap]]:
    """Every two of some sets, by name."""
    names = list(sets)
    return [
        (one, other, Overlap.between(sets[one], sets[other], of))
        for at, one in enumerate(names)
        for other in names[at + 1 :]
    ]
