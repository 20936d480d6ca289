"""Relative L2 error: how long is the difference, measured in lengths of the teacher's vector?

Definition: ||student - teacher|| / ||teacher|| per token; the mean of these ratios (not the ratio
of the means). 1 = as wrong as a zero vector.
Unit: none. Range: [0, inf). Null: 0.
Uses every real token, massive ones included: each counts once. inf where the teacher's vector is
exactly zero and the student's is not. A trace adds `growth`: the mean behind the last block over that
behind the last swapped one, paired over tokens.
Source: plain definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mismatch.metrics.base import Pair, TokenMetric


class RelL2(TokenMetric):
    unit = "||s - t|| / ||t||"
    range = "[0, inf)"
    better = "lower"
    null = {"mean": 0.0, "p50": 0.0, "p95": 0.0}
    headline = "mean"
    invariant = ()
    blind = "whether the layers behind use it: a large error in a direction that none reads counts in full"
    source = "definition: mean over tokens of ||s - t|| / ||t||"
    at = "stream"
    mask = "valid"
    stats = {"mean": ("ratio", "mean"), "p50": ("ratio", "p50"), "p95": ("ratio", "p95")}

    def values(self, pair: Pair) -> dict[str, Tensor]:
        ratio = pair.distance / pair.side.norm
        return {"ratio": torch.where(pair.distance == 0, torch.zeros_like(ratio), ratio)}
