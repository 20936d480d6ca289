"""How far back can the model copy from? Repeated random tokens of several lengths.

Definition: opening, R random tokens, the same R tokens again, for R of 32, 100 and 160, or the most that the context
holds. `nll_second[repeat=R]` is the mean NLL of the second copy without its first token, which cannot be known. The
prediction made at position q copies the token at q + 1 - R. With segments of S tokens (those of the swap; where it has
none, 64) that source is far when it lies beyond q's own segment and the one before, q + 1 - R < (floor(q / S) - 1) S,
and near otherwise: `nll_near` and `nll_far` are over all R. A window of at most S tokens reaches no far source in one
step. `nll_first` is over the first copies, where nothing can be known.
Unit: nats per token. Range: [0, inf). Null: the teacher against itself reads exactly 0 in every `_minus_teacher`.
Chance: `nll_first`.
Source: Olsson et al., arXiv 2209.11895; repeats longer than a bounded memory, as Jelassi et al., arXiv 2402.01032, show
them to be what a state of fixed size cannot copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap

import numpy as np
import torch

from mismatch.forward.head import scores
from mismatch.forward.hooks import on_device
from mismatch.forward.shared_prefix import finals
from mismatch.probes.base import Answers, Measure, Probe, Setting, Subject
from mismatch.probes.inputs import repeated
from mismatch.runs.table import under

REPEATS = (32, 100, 160)
"""Within a segment of 64 and its neighbour; on both sides of their border; beyond it."""
SEGMENT = 64
"""Of a swap that has none."""


class Copying(Probe):
    headline = "nll_second"
    unit = "nats per token"
    range = "[0, inf)"
    better = "lower"
    chance = "nll_first: a second copy is as new as a first one"
    shows = "how long a span can be copied, and whether from beyond the local part of a mechanism"
    blind = (
        "text, and single facts: a bounded memory that keeps every fact that is asked for may still "
        "not hold a long span"
    )
    source = "Olsson et al., arXiv 2209.11895; Jelassi et al., arXiv 2402.01032"
    needs = "tokens"
    by_batch = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        made = (repeated(setting, setting.samples, "copying", length) for length in REPEATS)
        # A context that is too short for several of them makes the same length of each.
        self.spans = {half: (ids, start) for ids, start, half in made}

    def run(self, subjects: Sequence[Subject]) -> Answers:
        segment = next((s.segment for s in subjects if s.segment is not None), SEGMENT)
        nll = {length: self._nll(subjects, length) for length in self.spans}
        return {
            s.name: self._measures(
                {length: found[s.name] for length, found in nll.items()}, segment
            )
            for s in subjects
        }

    def _nll(self, subjects: Sequence[Subject], length: int) -> dict[str, np.ndarray]:
        """Of every token behind the opening: float64 `samples pos` of each model, 0 where not scored."""
        every, start = self.spans[length]
        scored = torch.zeros(every.shape, dtype=torch.bool)
        scored[:, max(start, 1) :] = True
        scored[:, start + length] = False  # the first token of the second copy

        def one(part: slice) -> dict[str, np.ndarray]:
            ids = on_device(subjects[0].layout, every[part])
            mask = scored[part].to(ids.device)
            return {
                subject.name: -scores(subject.layout, final, ids, mask)[0].numpy()
                for subject, final in finals(subjects, ids)
            }

        with torch.no_grad():
            return self.setting.by_batch(len(every), one)

    def _measures(self, nll: dict[int, np.ndarray], segment: int) -> list[Measure]:
        measures, first, near, far = [], [], [], []
        for length, found in nll.items():
            start = self.spans[length][1]
            second = found[:, start + length + 1 :]
            beyond = far_sources(start + length + 1, found.shape[1], length, segment)
            measures.append(Measure.mean(under("nll_second", repeat=length), second))
            first.append(found[:, max(start, 1) : start + length])
            near.append(second[:, ~beyond])
            far.append(second[:, beyond])
        parts = (("nll_first", first), ("nll_near", near), ("nll_far", far))
        return [*measures, *starmap(_joined, parts)]


def far_sources(first: int, end: int, repeat: int, segment: int) -> np.ndarray:
    """bool: of the tokens at `first` .. `end` - 1, those whose copy lies beyond the own and the previous segment of the
    position that predicts them."""
    predicting = np.arange(first - 1, end - 1)
    return predicting + 1 - repeat < (predicting // segment - 1) * segment


def _joined(stat: str, parts: list[np.ndarray]) -> Measure:
    values = np.concatenate(parts, 1)
    return Measure.mean(stat, values) if values.shape[1] else Measure.absent(stat)
