"""Logit-lens KL: how far would the prediction be off if the model ended after this layer?

Definition: the final norm and the unembedding applied to both raw residual streams after a block, then
KL(teacher || student) per token, with the arithmetic of `kl`. Stats: mean, p50, p95.
Unit: nats per token. Range: [0, inf). Null: 0, exactly.
Uses the real tokens that the trace picks. Feed it raw block outputs: what transformers calls
`hidden_states[-1]` is already normed.
Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al. 2023 (arXiv
2303.08112) on its lack of calibration in early layers.
"""

from __future__ import annotations

from torch import Tensor

from mismatch.metrics.base import LogitPair, TokenMetric


class LensKL(TokenMetric):
    unit = "nats per token"
    range = "[0, inf)"
    better = "lower"
    null = {"mean": 0.0, "p50": 0.0, "p95": 0.0}
    headline = "mean"
    invariant = ()
    blind = (
        "early lenses are not calibrated: compare students at one layer rather than layers; what "
        "the unembedding does not read"
    )
    source = "nostalgebraist 2020, the logit lens"
    at = "lens"
    mask = "valid"
    stats = {"mean": ("kl", "mean"), "p50": ("kl", "p50"), "p95": ("kl", "p95")}

    def values(self, pair: LogitPair) -> dict[str, Tensor]:
        return {"kl": pair.kl}
