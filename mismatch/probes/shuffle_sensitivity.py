"""Does the order of far context matter? Tokens before the last w permuted.

Definition: text of T tokens, and the same with positions 1 .. T-1-w permuted; `kl` = KL(plain || shuffled) of the next
token at the last 8 positions, by one and the same model, mean over windows, for w = 16, 48 and 96.
Unit: nats per token. Range: [0, inf). Null: the teacher against itself reads exactly 0 in `kl_minus_teacher`.
Chance: 0: a model that does not read that far, or reads it as a bag of words.
Source: Khandelwal et al., arXiv 1805.04623, section 4 (order matters only nearby); measured on SmolLM2-135M: 1.59,
.61 and .28; without RoPE in all layers .05, in one layer hardly less.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mismatch.errors import UsageError
from mismatch.forward.head import log_probs
from mismatch.forward.hooks import on_device
from mismatch.forward.shared_prefix import finals
from mismatch.metrics.sums.logits import kl_float64
from mismatch.probes.base import Answers, Measure, Probe, Setting, Subject
from mismatch.runs.table import under

NEAR = (16, 48, 96)  # last tokens that are not permuted
LAST = 8  # positions at the end that are compared
FEWEST = 4  # tokens in front of the last ones: position 0 and something to permute


class ShuffleSensitivity(Probe):
    headline = "kl"
    unit = "nats per token"
    range = "[0, inf)"
    better = "higher"
    chance = "0: far context is out of reach, or a bag of words"
    shows = "how far back the order of words still reaches the prediction, in the whole model"
    blind = (
        "one layer among many: the others carry order too (order_sensitivity measures one); a model "
        "that lost its language reads anything"
    )
    source = "arXiv 1805.04623, section 4"
    needs = "text"
    by_batch = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.ids = setting.windows("shuffle_sensitivity")
        count, length = self.ids.shape
        draw = setting.draw("shuffle_sensitivity")
        self.mixed: dict[int, np.ndarray] = {}
        for near in NEAR:
            if length - near < FEWEST:
                continue
            mixed = self.ids.copy()
            for row in range(count):
                mixed[row, 1 : length - near] = draw.permutation(mixed[row, 1 : length - near])
            self.mixed[near] = mixed
        if not self.mixed:
            raise UsageError(
                f"shuffle_sensitivity needs windows of {NEAR[0] + FEWEST} tokens or more, and they have {length}",
                hint=f"take --seq-len {NEAR[0] + FEWEST} or more",
            )

    def run(self, subjects: Sequence[Subject]) -> Answers:

        def one(part: slice) -> dict[tuple[str, int], np.ndarray]:
            plain = self._ends(subjects, self.ids[part])
            return {
                (name, near): kl_float64(plain[name], ends).cpu().numpy()
                for near, mixed in self.mixed.items()
                for name, ends in self._ends(subjects, mixed[part]).items()
            }

        with torch.no_grad():
            found = self.setting.by_batch(len(self.ids), one)
        answers: dict[str, list[Measure]] = {subject.name: [] for subject in subjects}
        for (name, near), apart in found.items():
            answers[name].append(Measure.mean(under("kl", near=near), apart))
        return answers

    def _ends(self, subjects: Sequence[Subject], ids: np.ndarray) -> dict[str, torch.Tensor]:
        """Log-probabilities of each subject at the last positions, `batch LAST vocab`."""
        return {
            subject.name: log_probs(subject.layout, final[:, -LAST:])
            for subject, final in finals(subjects, on_device(subjects[0].layout, ids))
        }
