"""Angular distance: the angle between the vectors as a share of a half turn.

Definition: arccos(cos(student, teacher)) / pi per token, computed as 2 atan2(|u - v|, |u + v|) / pi
for unit vectors u, v: exact near 0, where arccos of a rounded cosine has only half the digits.
0 = same direction, 0.5 = orthogonal, 1 = opposite. A zero vector counts as orthogonal.
Unit: half turns. Range: [0, 1]. Null: 0.
Uses every real token, massive ones included: each counts once.
Source: Gromov et al. 2024 (arXiv 2403.17887), eq. 7; the formula is Kahan's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mismatch.metrics.base import Pair, TokenMetric


class Angle(TokenMetric):
    unit = "half turns"
    range = "[0, 1]"
    better = "lower"
    null = {"mean": 0.0}
    headline = "mean"
    invariant = ("scale",)
    blind = "length; dominated by outlier channels, which the next layer's norm weights may mute"
    source = "Gromov et al. 2024, arXiv 2403.17887, eq. 7"
    at = "stream"
    mask = "valid"
    stats = {"mean": ("angle", "mean")}

    def values(self, pair: Pair) -> dict[str, Tensor]:
        half = torch.atan2(pair.chord2.sqrt(), (4 - pair.chord2).sqrt())
        return {"angle": half * (2 / math.pi)}
