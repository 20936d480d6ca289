"""Norm ratio: did the vectors grow or shrink?

Definition: log2(||student|| / ||teacher||) per token; stats mean (2 to the power of it is the
geometric mean of the ratios), p5, p50, p95. +1 = twice as long.
Unit: log2 of a ratio. Range: held in [-24, 24] (a vector that is gone reads -24). Null: 0.
Uses every real token, massive ones included: each counts once, whatever its size.
Quantiles come from a histogram (right to 1 %) and have no interval.
Source: plain definition; the geometric mean because ratios average on a log scale.
"""

from __future__ import annotations

from torch import Tensor

from mismatch.metrics.base import Pair, TokenMetric
from mismatch.metrics.sums.pairs import log2_ratio


class NormRatio(TokenMetric):
    unit = "log2 ratio"
    range = "[-24, 24]"
    better = "none"
    null = {"mean": 0.0, "p5": 0.0, "p50": 0.0, "p95": 0.0}
    headline = "mean"
    invariant = ("rotation", "permutation")
    blind = (
        "direction: any rotation; growth of some tokens that shrinkage of others cancels (p5, p95)"
    )
    source = "definition: log2(||s|| / ||t||) per token"
    at = "stream"
    mask = "valid"
    stats = {
        "mean": ("log2", "mean"),
        "p5": ("log2", "p5"),
        "p50": ("log2", "p50"),
        "p95": ("log2", "p95"),
    }

    def values(self, pair: Pair) -> dict[str, Tensor]:
        return {"log2": log2_ratio(pair.norm, pair.side.norm)}
