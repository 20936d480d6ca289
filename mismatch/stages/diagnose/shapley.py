"""From sums over documents to shares of the damage: what each correction returns, and the three causes.

A share is 1 - KL corrected / KL swapped, a ratio of sums, resampled by document on both sides at once. The share of a
cause is its Shapley value (Shapley 1953): what it returns on top of the others, averaged over all orders in which they
can be corrected; with the remainder the shares add up to 1. Two causes whose corrections return the same damage divide
it between them.

The leading correction is the simplest one that returns nearly as much as any: a best linear map also mends a wrong
scale, and is not the name of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

import numpy as np

from mismatch.forward.heldout import Judged
from mismatch.metrics.sums.readings import interval, resamples
from mismatch.stages.diagnose.corrections import CAUSES
from mismatch.stages.diagnose.numbers import Kl, Returned, Share

NEARLY = 0.95
"""Of the best share: a simpler correction that returns so much is the name of it."""
LITTLE = 0.25
"""Below this no correction leads."""
SIMPLEST = ("scale", "mean", "first", "delay", "affine", "position", "size", "massive")
"""From few numbers to many; then heads and branches, then these:"""
RICHEST = ("rope", "linear")


def kl_of(judged: Judged, seed: int) -> Kl:
    """KL in nats per token."""
    return Kl(*judged.mean_kl(seed))


def share_of(judged: Judged, swapped: Judged, seed: int) -> Share:
    """What a correction returns."""
    return Share(*judged.gap_closed(swapped, seed))


def causes_of(
    joint: Mapping[tuple[str, ...], Judged], swapped: Judged, seed: int
) -> tuple[dict[str, Share], Share]:
    """Shapley shares of the causes, and the remainder.

    Args:
        joint: by set of causes, in the order of `CAUSES`.
        swapped: with nothing corrected.
        seed: of the resampling.
    """
    names = tuple(CAUSES)
    weights = np.concatenate([np.ones((1, len(swapped.kl))), resamples(len(swapped.kl), seed)])
    whole = weights @ swapped.kl
    with np.errstate(invalid="ignore", divide="ignore"):
        value = {chosen: 1.0 - (weights @ found.kl) / whole for chosen, found in joint.items()}
    value[()] = np.zeros(len(weights))
    total = {name: np.zeros(len(weights)) for name in names}
    orders = list(permutations(names))
    for order in orders:
        for at, name in enumerate(order):
            before, now = (tuple(n for n in names if n in order[:end]) for end in (at, at + 1))
            total[name] += (value[now] - value[before]) / len(orders)
    shares = {name: _share(draws) for name, draws in total.items()}
    return shares, _share(1.0 - value[names])


def _share(draws: np.ndarray) -> Share:
    return Share(float(draws[0]), *interval(draws[1:]))


def leading(returned: Sequence[Returned]) -> str | None:
    """The simplest correction that returns nearly as much as any; None: none returns much, beyond chance."""
    single = [r for r in returned if np.isfinite(r.share.value) and not r.name.startswith("layer ")]
    best = max(single, key=lambda r: r.share.value, default=None)
    if best is None or best.share.value < LITTLE or best.share.lo <= 0:
        return None
    near = [r for r in single if r.share.value >= NEARLY * best.share.value]
    return min(near, key=_order).name


def _order(one: Returned) -> tuple[int, float]:
    if one.name in SIMPLEST:
        return SIMPLEST.index(one.name), 0.0
    if one.name in RICHEST:
        return len(SIMPLEST) + 1 + RICHEST.index(one.name), 0.0
    return len(SIMPLEST), -one.share.value
