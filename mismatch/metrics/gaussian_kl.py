"""Gaussian KL: how surprised would a Gaussian that fits the teacher's tokens be by the student's?

Definition: KL(teacher || student) = 1/2 [tr(S_s^-1 S_t) + dm' S_s^-1 dm - d + ln det S_s / det S_t]
of the Gaussians with both sides' means and Ledoit-Wolf shrunk covariances (divided by n). Stats:
value; reverse = KL(student || teacher); null = the value between the teacher's even and odd
documents: what two samples of ONE law read at half of the tokens.
Unit: nats. Range: [0, inf). Null: value 0, reverse 0 (same tokens).
Unlike Frechet it weights all directions alike, so it sees small variances; without structure its
null is about d (d + 3) / (2 n) nats per sample: print it beside the value.
Leaves out position 0 and massive tokens and uses a sample of the rest. inf where one side is a
single point, nan with fewer than 2 tokens on a side. No interval.
Source: closed form; shrinkage: Ledoit and Wolf 2004, section 3.3.
"""

from __future__ import annotations

from mismatch.metrics.base import Metric, Moments, Reading
from mismatch.metrics.sums.gaussian import shrunk_kl


class GaussianKL(Metric):
    unit = "nats"
    range = "[0, inf)"
    better = "lower"
    null = {"value": 0.0, "reverse": 0.0}
    headline = "value"
    invariant = ("joint rotation",)
    blind = (
        "which token moved where; anything beyond two moments; the shrinkage mutes small variances"
    )
    source = "closed form with Ledoit and Wolf 2004 shrinkage"
    at = "stream"
    mask = "sample"
    state = "moments"

    def read(self, state: Moments) -> list[Reading]:
        teacher, student = state.teacher, state.student
        return [
            Reading("value", 0.0 if state.equal else shrunk_kl(teacher, student), n=state.n),
            Reading("reverse", 0.0 if state.equal else shrunk_kl(student, teacher), n=state.n),
            Reading("null", state.view.null("gaussian_kl", shrunk_kl), n=state.n),
        ]
