"""From sums over documents to shares of the damage: what each correction recovers, and the three causes.

A share is 1 - KL corrected / KL swapped, a ratio of sums, whose interval leaves out documents on both sides at once.
The share of a cause is its Shapley value (Shapley 1953): what it recovers on top of the others, averaged over all
orders in which they can be corrected; with the remainder the shares add up to 1. Two causes whose corrections recover
the same damage divide it between them.

The leading correction is the simplest one that recovers nearly as much as any: a best linear map also repairs a wrong
scale, and is not the name of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np

from mismatch.forward.heldout import Evaluated
from mismatch.metrics.sums.per_document import Total, estimate
from mismatch.stages.diagnose.corrections import CAUSES
from mismatch.stages.diagnose.numbers import Correction, Kl, Share

NEARLY = 0.95
"""Of the best share: a simpler correction that recovers so much is the name of it."""
LITTLE = 0.25
"""Below this no correction leads."""
SIMPLEST = ("scale", "mean", "first", "delay", "affine", "position", "size", "massive")
"""From few numbers to many; then heads and branches, then these:"""
RICHEST = ("rope", "linear")


def kl_of(found: Evaluated) -> Kl:
    """KL in nats per token."""
    return Kl(*found.kl.mean()[:4])


def share_of(found: Evaluated, swapped: Evaluated) -> Share:
    """The share of the damage that a correction recovers."""
    return Share(*found.kl.gap_closed(swapped.kl)[:3])


def causes_of(
    joint: Mapping[tuple[str, ...], Evaluated], swapped: Evaluated
) -> tuple[dict[str, Share], Share]:
    """Shapley shares of the causes, and the remainder.

    Args:
        joint: by set of causes, in the order of `CAUSES`.
        swapped: with nothing corrected.
    """
    names = tuple(CAUSES)
    orders = list(permutations(names))

    def recovered(chosen: Sequence[str], total: Total) -> Any:
        if not chosen:
            return 0.0
        found = joint[tuple(name for name in names if name in chosen)]
        return 1.0 - total(found.kl.sums) / total(swapped.kl.sums)

    def added(name: str, total: Total) -> Any:
        """What a cause recovers on top of those in front of it, mean over all orders."""
        found = 0.0
        for order in orders:
            at = order.index(name)
            more = recovered(order[: at + 1], total) - recovered(order[:at], total)
            found = found + more / len(orders)
        return found

    def share(statistic: Callable[[Total], Any]) -> Share:
        return Share(*estimate(statistic, swapped.kl.counts, swapped.kl.units)[:3])

    shares = {name: share(partial(added, name)) for name in names}
    return shares, share(lambda total: 1.0 - recovered(names, total))


def leading(corrections: Sequence[Correction]) -> str | None:
    """The simplest correction that recovers nearly as much as any; None: none recovers much, beyond chance."""
    single = [
        r for r in corrections if np.isfinite(r.share.value) and not r.name.startswith("layer ")
    ]
    best = max(single, key=lambda r: r.share.value, default=None)
    if best is None or best.share.value < LITTLE or not best.share.lo > 0:
        return None
    near = [r for r in single if r.share.value >= NEARLY * best.share.value]
    return min(near, key=_order).name


def _order(one: Correction) -> tuple[int, float]:
    if one.name in SIMPLEST:
        return SIMPLEST.index(one.name), 0.0
    if one.name in RICHEST:
        return len(SIMPLEST) + 1 + RICHEST.index(one.name), 0.0
    return len(SIMPLEST), -one.share.value
