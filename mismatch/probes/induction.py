"""Can the model copy from its own context? Repeated random tokens.

Definition: opening, R random tokens, the same R tokens again (R = 64). Measured are the mean NLL of the first copy
(`nll_first`: nothing can be known, a control inside the probe) and of the second one (`nll_second`), the difference
(`gain` = first - second: what having seen it before is worth), and how often the next token of the second copy is the
likeliest (`top1_second`). The first token of the second copy cannot be known, and is in neither.
Unit: nats per token. Range: [0, inf). Null: the teacher against itself reads exactly 0 in every `_minus_teacher`.
Chance: a model that cannot copy reads a gain of about 0, as does any model when the second copy is other tokens.
Source: Olsson et al., arXiv 2209.11895 (induction heads); measured on SmolLM2-135M: without RoPE in layer 16, which
holds its best previous-token head, text costs +0.12 nats, the second copy +7.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mismatch.forward.head import scores
from mismatch.forward.hooks import on_device
from mismatch.forward.shared_prefix import finals
from mismatch.probes.base import Answers, Measure, Probe, Setting, Subject
from mismatch.probes.inputs import repeated


class Induction(Probe):
    headline = "nll_second"
    unit = "nats per token"
    range = "[0, inf)"
    better = "lower"
    chance = "nll_second = nll_first: the second copy is as new as the first"
    shows = "whether tokens can be found by what stood before them, which needs position and reach"
    blind = (
        "which head does it, and whether text suffers: a model may lose 7 nats here and 0.1 there; "
        "spans longer than a copy"
    )
    source = "Olsson et al., arXiv 2209.11895"
    needs = "tokens"
    by_batch = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.ids, self.start, self.half = repeated(setting, setting.samples)

    def run(self, subjects: Sequence[Subject]) -> Answers:
        second = self.start + self.half
        scored = torch.zeros(self.ids.shape, dtype=torch.bool)
        # The very first token of a text is given; the first one of the second copy cannot be known.
        scored[:, max(self.start, 1) : second] = True
        scored[:, second + 1 :] = True

        def one(part: slice) -> dict[tuple[str, str], np.ndarray]:
            read = {}
            ids = on_device(subjects[0].layout, self.ids[part])
            for subject, final in finals(subjects, ids):
                value, right = scores(subject.layout, final, ids, scored[part].to(ids.device))
                read[subject.name, "nll"] = -value.numpy()
                read[subject.name, "right"] = right.numpy()
            return read

        with torch.no_grad():
            found = self.setting.by_batch(len(self.ids), one)
        return {
            s.name: self._measures(found[s.name, "nll"], found[s.name, "right"], second)
            for s in subjects
        }

    def _measures(self, nll: np.ndarray, right: np.ndarray, second: int) -> list[Measure]:
        # The same columns in both copies: the gain then compares the same tokens.
        first = nll[:, self.start + 1 : second]
        again = nll[:, second + 1 :]
        return [
            Measure.mean("nll_first", first),
            Measure.mean("nll_second", again),
            Measure.mean("gain", first - again),
            Measure.mean("top1_second", right[:, second + 1 :]),
        ]
