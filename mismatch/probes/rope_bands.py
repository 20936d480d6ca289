"""Which rotation frequencies make up the scores of a layer? RoPE by bands, and how far its base reaches.

Definition, of each swapped layer on text: the channel pairs in four bands from the fastest rotation (band 1) to the
slowest (band 4). `norm_share` = share of a band in sum over pairs of mean |q_pair| mean |k_pair|, mean over heads,
position 0 left out; `score_variance` = variance over the keys of a query of what the band adds to the scores (before
softcap and softmax), mean over queries from 16 on and heads: what a band can decide, which norms do not say; band 0
are channels that are not rotated. `bound`: the first distance m at which B(m) = sum_i cos(m theta_i) < 0: beyond it
the base no longer lets a like key score above an unlike one. theta_i are those of the rotation that the layer actually
gets, so a swap of the rotary embedding shows.
Unit: share. Range: [0, 1]. Null: the teacher against itself reads exactly 0 in every `_minus_teacher`.
Chance: 1/4 each: a layer of random weights prefers no band.
Source: Barbero et al., arXiv 2410.06205 (fast bands: position; slow ones: content); bound: Men et al., arXiv
2405.14591; measured on SmolLM2-135M: .12 .17 .21 .50 in layer 12, bound 3616.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mismatch.forward.hooks import on_device
from mismatch.probes.attention import Observed, observe_all
from mismatch.probes.base import Answers, Measure, Probe, Setting, Subject, swapped_layers
from mismatch.runs.table import under

BANDS = 4
SKIP = 16
"""First queries that are left out: they have too few keys for a variance."""

FAR = 2**21
"""Largest distance that is tried for the bound."""

AT_ONCE = 2**14
"""Distances of one step of that search: a matter of memory."""


class RopeBands(Probe):
    headline = "norm_share"
    unit = "share"
    range = "[0, 1]"
    better = "none"
    chance = "1/4 each: no band is preferred"
    shows = "whether a layer scores by position (fast bands) or by content (slow bands)"
    blind = (
        "whether the scores matter: measured over ten layers, the share of slow bands hardly predicts the "
        "damage of removing RoPE (Spearman -.43)"
    )
    source = "arXiv 2410.06205; arXiv 2405.14591"
    needs = "text"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.ids = setting.windows("rope_bands")

    def run(self, subjects: Sequence[Subject]) -> Answers:
        layers = swapped_layers(subjects)
        parts: dict[str, dict[int, list[dict[str, np.ndarray]]]] = {s.name: {} for s in subjects}
        bounds: dict[str, dict[int, float]] = {s.name: {} for s in subjects}
        known: dict[str, frozenset[int]] = {}

        def visit(name: str, seen: Observed) -> None:
            if seen.angles is None:
                return
            parts[name].setdefault(seen.layer, []).append(_read(seen, seen.angles))
            if seen.layer not in bounds[name]:
                bounds[name][seen.layer] = bound(seen.angles)

        with torch.no_grad():
            for at in range(0, len(self.ids), self.setting.batch_size):
                ids = on_device(subjects[0].layout, self.ids[at : at + self.setting.batch_size])
                known = observe_all(subjects, ids, layers, visit)
        teacher = subjects[0].name
        answers: dict[str, list[Measure]] = {}
        for subject in subjects:
            answers[subject.name] = []
            for layer in layers:
                address = {"layer": layer, "site": "attn_out"}
                # A layer in front of this subject's own swap is the teacher's.
                who = subject.name if layer in parts[subject.name] else teacher
                if layer not in known[subject.name] or layer not in parts[who]:
                    for band in range(1, BANDS + 1):
                        stat = under("norm_share", band=band)
                        answers[subject.name].append(Measure.absent(stat, **address))
                    continue
                for stat in parts[who][layer][0]:
                    values = np.concatenate([part[stat] for part in parts[who][layer]])
                    size = self.ids.shape[1] - (1 if stat.startswith("norm") else SKIP)
                    answers[subject.name].append(Measure.mean(stat, values, size, **address))
                number = bounds[who][layer]
                answers[subject.name].append(
                    Measure.absent("bound", **address)
                    if np.isnan(number)
                    else Measure.number("bound", number, 1, **address)
                )
        return answers


def bound(angles: Tensor) -> float:
    """The first distance at which the sum of cosines is negative; nan where it never is, up to `FAR`.

    Args:
        angles: radians from one position to the next, float64 `pairs`.
    """
    for start in range(0, FAR, AT_ONCE):
        distance = torch.arange(start, start + AT_ONCE, dtype=torch.float64)
        negative = (torch.cos(distance[:, None] * angles).sum(1) < 0).nonzero()
        if len(negative):
            return float(start + negative[0])
    return float("nan")


def _read(seen: Observed, angles: Tensor) -> dict[str, np.ndarray]:
    """`norm_share` and `score_variance` of each band: `samples`."""
    pairs = len(angles)
    order = angles.abs().argsort(descending=True, stable=True)
    q = _pair_norms(seen.q, pairs)
    k = seen.parts.per_query_head(_pair_norms(seen.k, pairs))
    strength = (q * k).mean(1)  # `batch pairs`
    total = strength.sum(-1)
    found = {}
    bands = [band.tolist() for band in order.tensor_split(BANDS)]
    for i, band in enumerate(bands, 1):
        share = strength[:, band].sum(-1) / total
        found[under("norm_share", band=i)] = share.double().cpu().numpy()
        channels = [*band, *(pair + pairs for pair in band)]
        found[under("score_variance", band=i)] = _variance(seen, channels)
    rest = list(range(2 * pairs, seen.q.shape[-1]))
    if rest:
        found[under("score_variance", band=0)] = _variance(seen, rest)
    return found


def _pair_norms(x: Tensor, pairs: int) -> Tensor:
    """Mean over positions of the length of each rotated pair, `batch heads pairs`: channel i turns with i + pairs."""
    x = x[:, :, 1:].float()
    return torch.hypot(x[..., :pairs], x[..., pairs : 2 * pairs]).mean(2)


def _variance(seen: Observed, channels: list[int]) -> np.ndarray:
    scores = seen.scores(channels)
    allowed = seen.mask.expand_as(scores).float()
    count = allowed.sum(-1, keepdim=True).clamp_min(1)
    mean = (scores * allowed).sum(-1, keepdim=True) / count
    variance = ((scores - mean).square() * allowed).sum(-1) / count[..., 0]
    return variance[:, :, SKIP:].mean((1, 2)).double().cpu().numpy()
