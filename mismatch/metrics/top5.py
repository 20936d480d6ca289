"""Top-5 disagreement: how much of the teacher's short list is lost?

Definition: 1 - |top 5 of teacher and top 5 of student| / 5 per token, as sets.
Unit: share of the list. Range: [0, 1]. Null: 0, exactly.
Uses every real token, position 0 included.
Source: plain definition.
"""

from __future__ import annotations

from torch import Tensor

from mismatch.metrics.base import LogitPair, TokenMetric


class Top5(TokenMetric):
    unit = "share of the five likeliest that is lost"
    range = "[0, 1]"
    better = "lower"
    null = {"mean": 0.0}
    headline = "mean"
    invariant = ("scale",)
    blind = "order inside the list, and all probabilities"
    source = "definition: mean of 1 - |top5(s) & top5(t)| / 5"
    at = "logits"
    mask = "valid"
    stats = {"mean": ("lost", "mean")}

    def values(self, pair: LogitPair) -> dict[str, Tensor]:
        teacher, student = pair.top
        shared = (teacher[:, :, None] == student[:, None, :]).sum((1, 2))
        return {"lost": (teacher.shape[1] - shared).double() / teacher.shape[1]}
