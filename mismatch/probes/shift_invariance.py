"""Does the output depend on where the text starts? The same text at shifted position ids.

Definition: the text once at positions 0 .. T-1 and once at s .. T-1+s, by the same model; `kl` = KL(plain || shifted)
of the next token at the last 16 positions, mean, for s = 1, 256 and the largest that fits the context. RoPE knows only
distances, so a model with it reads 0 up to float rounding, which grows with s.
Unit: nats per token. Range: [0, inf). Null: the teacher against itself reads exactly 0 in `kl_minus_teacher`.
Chance: 0: a model that knows no position at all reads 0 as well.
Source: relative encoding of RoPE (Su et al., arXiv 2104.09864, section 3.4); measured on SmolLM2-135M: at most 2e-9
(.7 when an absolute code is added at layer 12).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mismatch.forward.head import log_probs
from mismatch.forward.hooks import on_device
from mismatch.metrics.sums.logits import kl_float64
from mismatch.probes.base import Answers, Measure, Probe, Setting, Subject
from mismatch.runs.table import under

SHIFTS = (1, 256)  # positions
LAST = 16  # positions at the end that are compared


class ShiftInvariance(Probe):
    headline = "kl"
    unit = "nats per token"
    range = "[0, inf)"
    better = "lower"
    chance = "0: a model without position is not changed by a shift"
    shows = "absolute positions and wrong offsets: a cache that counts from 0, positions learned or added"
    blind = (
        "lost position, by design: without RoPE it reads 0 too; segment borders, which follow the "
        "text and not the position ids"
    )
    source = "arXiv 2104.09864, section 3.4"
    needs = "text"
    by_batch = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.ids = setting.windows("shift_invariance")
        length = self.ids.shape[1]
        room = None if setting.context is None else setting.context - length
        shifts = {s for s in SHIFTS if room is None or s <= room}
        self.shifts = sorted(shifts | ({room} if room else set()))
        if not self.shifts:
            setting.fits(length + 1, "a shifted text", "take a smaller --seq-len")

    def run(self, subjects: Sequence[Subject]) -> Answers:
        def one(part: slice) -> dict[tuple[str, int], np.ndarray]:
            apart = {}
            for subject in subjects:
                ids = on_device(subject.layout, self.ids[part])
                plain = _ends(subject, ids, 0)
                for shift in self.shifts:
                    moved = kl_float64(plain, _ends(subject, ids, shift))
                    apart[subject.name, shift] = moved.cpu().numpy()
            return apart

        with torch.no_grad():
            found = self.setting.by_batch(len(self.ids), one)
        return {
            s.name: [
                Measure.mean(under("kl", shift=shift), found[s.name, shift])
                for shift in self.shifts
            ]
            for s in subjects
        }


def _ends(subject: Subject, ids: torch.Tensor, shift: int) -> torch.Tensor:
    """Log-probabilities at the last positions, `batch LAST vocab`. All of the model runs: its blocks in front of
    the swap see other positions too."""
    positions = torch.arange(shift, shift + ids.shape[1], device=ids.device).expand_as(ids)
    layout = subject.layout
    final = layout.decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return log_probs(layout, final[:, -LAST:])
