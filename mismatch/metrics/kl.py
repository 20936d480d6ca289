"""Output KL: how far is the student's prediction of the next token from the teacher's?

Definition: KL(teacher || student) = sum_v p (log p - log q) per token, computed in float32 as
sum p (expm1(d) - d), d = log q - log p, whose terms are all >= 0 (the plain sum is noise below
1e-6 and negative half of the time). Stats: mean (also per position bin), p50, p95, max.
Unit: nats per token. Range: [0, inf). Null: 0, exactly.
Uses every real token, position 0 included. bf16 logits bring about 2e-4 nats of their own.
Source: Kullback and Leibler 1951; direction as in Hinton et al. 2015 (arXiv 1503.02531).
"""

from __future__ import annotations

from torch import Tensor

from mismatch.metrics.base import LogitPair, TokenMetric


class KL(TokenMetric):
    unit = "nats per token"
    range = "[0, inf)"
    better = "lower"
    null = {"mean": 0.0, "p50": 0.0, "p95": 0.0, "max": 0.0}
    headline = "mean"
    invariant = ()
    blind = (
        "whether the change is for the better; without the controls zero and mean it means "
        "nothing, and ordinary text hides lost position"
    )
    source = "Kullback and Leibler 1951"
    at = "logits"
    mask = "valid"
    stats = {
        "mean": ("kl", "mean"),
        "p50": ("kl", "p50"),
        "p95": ("kl", "p95"),
        "max": ("kl", "max"),
    }

    def values(self, pair: LogitPair) -> dict[str, Tensor]:
        return {"kl": pair.kl}
