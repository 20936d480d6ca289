"""Update size: how large a step does this layer make, against the stream it is added to?

Definition: ||update|| / ||stream before|| per token, at attn_out and mlp_out. Stats: teacher and
student = mean of the ratio; shift = mean of log2(student's ratio / teacher's ratio).
Deep models expect small steps (in SmolLM2, layers 2-14: 0.11 to 0.19); a swap that makes large
ones breaks the residual premise.
Unit: none; shift in log2. Range: [0, inf); shift held in [-24, 24]. Null: shift 0.
Uses every real token, massive ones included: each counts once.
Source: plain definition; the premise is discussed in Gromov et al. 2024 (arXiv 2403.17887), s. 2.
"""

from __future__ import annotations

from torch import Tensor

from mismatch.errors import MismatchError
from mismatch.metrics.base import Pair, TokenMetric
from mismatch.metrics.sums.pairs import log2_ratio


class UpdateSize(TokenMetric):
    unit = "log2 ratio of ||update|| / ||stream||"
    range = "[-24, 24]"
    better = "none"
    null = {"shift": 0.0}
    headline = "shift"
    invariant = ("rotation", "permutation")
    blind = "direction of the update: a step of the right size the wrong way reads 0"
    source = "definition: ||update|| / ||stream before it|| per token"
    at = "update"
    mask = "valid"
    stats = {
        "shift": ("shift", "mean"),
        "teacher": ("teacher", "mean"),
        "student": ("student", "mean"),
    }

    def values(self, pair: Pair) -> dict[str, Tensor]:
        if pair.before is None:
            raise MismatchError(
                "update_size needs the stream before the update, and this pair has none",
                hint="it is measured at attn_out and mlp_out; pass before=(teacher, student).",
            )
        teacher = pair.side.norm / pair.side.before_norm
        student = pair.norm / pair.before_norm
        return {"shift": log2_ratio(student, teacher), "teacher": teacher, "student": student}
