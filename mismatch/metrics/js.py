"""Jensen-Shannon divergence: the symmetric, bounded relative of the KL.

Definition: 1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2, per token, p the teacher and q the student;
computed as 1/2 sum p [(1 + u) d - (2 + u) ln(1 + u/2)], u = q/p - 1, whose terms are all >= 0.
(scipy's `jensenshannon` is the square root of it.)
Unit: nats per token. Range: [0, ln 2]. Null: 0, exactly.
Uses every real token, position 0 included.
Source: Lin 1991, "Divergence measures based on the Shannon entropy", eq. 4.1.
"""

from __future__ import annotations

from torch import Tensor

from mismatch.metrics.base import LogitPair, TokenMetric


class JS(TokenMetric):
    unit = "nats per token"
    range = "[0, ln 2]"
    better = "lower"
    null = {"mean": 0.0}
    headline = "mean"
    invariant = ()
    blind = "how wrong a token is once it is wrong: it saturates at ln 2"
    source = "Lin 1991, eq. 4.1"
    at = "logits"
    default = False  # costs more than KL, and shows much the same
    mask = "valid"
    stats = {"mean": ("js", "mean")}

    def values(self, pair: LogitPair) -> dict[str, Tensor]:
        return {"js": pair.js}
