"""Cosine distance: do the vectors still point the same way?

Definition: 1 - cos(student, teacher) per token, computed as ||s/|s| - t/|t|||^2 / 2, which is
exactly 0 for equal vectors and loses nothing near it (1 - a rounded cosine would).
0 = same direction, 1 = orthogonal, 2 = opposite. A zero vector counts as orthogonal (1).
Unit: 1 - cos. Range: [0, 2]. Null: 0.
Uses every real token, massive ones included: each counts once.
Source: plain definition; 1 - mean cos of a block's input and output is ShortGPT's Block Influence
(Men et al. 2024, arXiv 2403.03853, eq. 1).
"""

from __future__ import annotations

from torch import Tensor

from mismatch.metrics.base import Pair, TokenMetric


class Cosine(TokenMetric):
    unit = "1 - cos"
    range = "[0, 2]"
    better = "lower"
    null = {"mean": 0.0, "p50": 0.0, "p95": 0.0}
    headline = "mean"
    invariant = ("scale",)
    blind = "length; dominated by outlier channels, which the next layer's norm weights may mute"
    source = "definition: 1 - s.t / (||s|| ||t||) per token"
    at = "stream"
    mask = "valid"
    stats = {"mean": ("distance", "mean"), "p50": ("distance", "p50"), "p95": ("distance", "p95")}

    def values(self, pair: Pair) -> dict[str, Tensor]:
        return {"distance": pair.chord2 / 2}
