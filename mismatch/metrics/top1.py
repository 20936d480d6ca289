"""Top-1 disagreement: how often does the likeliest next token change?

Definition: share of tokens where argmax of the student differs from argmax of the teacher.
(Agreement is 1 minus this.)
Unit: share of tokens. Range: [0, 1]. Null: 0, exactly.
Uses every real token, position 0 included. bf16 weights alone read about 0.03.
Source: plain definition.
"""

from __future__ import annotations

from torch import Tensor

from mismatch.metrics.base import LogitPair, TokenMetric


class Top1(TokenMetric):
    unit = "share of tokens that disagree"
    range = "[0, 1]"
    better = "lower"
    null = {"mean": 0.0}
    headline = "mean"
    invariant = ("scale",)
    blind = "probabilities: a sure prediction and a lucky one count alike"
    source = "definition: mean of [argmax s != argmax t]"
    at = "logits"
    mask = "valid"
    stats = {"mean": ("disagree", "mean")}

    def values(self, pair: LogitPair) -> dict[str, Tensor]:
        teacher, student = pair.top
        return {"disagree": teacher[:, 0] != student[:, 0]}
