"""What do the heads attend to? Previous-token, induction and sink heads, entropy and distance, per head.

Definition, from the attention weights a_ij of query i to key j, mean over queries and samples, one number a head:
`previous` = a_{i,i-1} on text; `induction` = a_{i,i-R+1} in the second of two equal runs of R random tokens: the token
that followed last time; `sink` = a_{i,0}; `entropy` = -sum_j a_ij ln a_ij; `distance` = sum_j a_ij (i-j) over the keys
but the sink, weights renormalised to 1; `mass` per distance 0, 1, 2-3, 4-7, ... of a layer, mean over heads, the sink
left out. All but the first two are measured on text from query 16 on. `best_induction`, `best_previous`: of the best
head anywhere.
Unit: share of attention. Range: [0, 1]. Null: the teacher against itself reads exactly 0 in every `_minus_teacher`.
Chance: a head that attends uniformly reads 1 / (i + 1); at 160 tokens a distance of about 43.
Source: Olsson et al., arXiv 2209.11895; sink: Gu et al., arXiv 2410.10781; measured on SmolLM2-135M: layer 16 head 0
attends to the token before with .79, 18.6 is its induction head with .91, which falls to .25 without RoPE in layer 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mismatch.errors import UsageError
from mismatch.forward.hooks import on_device
from mismatch.probes.attention import Observed, observe_all
from mismatch.probes.base import Answers, Measure, Probe, Setting, Subject
from mismatch.probes.inputs import repeated
from mismatch.runs.table import under

SKIP = 16
"""First queries that are left out: their prefix is too short."""

TINY = 1e-12  # against division by 0 where all weight is on the sink

ON_TEXT = ("previous", "sink", "entropy", "distance")
"""What is measured of each head on text; `induction` is measured on repeated tokens."""

MASS = "mass"
"""Of a layer: the mean over its heads."""

Numbers = dict[int, dict[str, np.ndarray]]
"""By layer and stat: `samples heads`, or `samples` for a number of the whole layer."""


class Heads(Probe):
    headline = "best_induction"
    unit = "share of attention"
    range = "[0, 1]"
    better = "higher"
    chance = "1 / (i + 1): a head that attends uniformly"
    shows = "which heads carry order and copying, and how far a layer attends, before and after"
    blind = (
        "what the values do with it, and whether the model needs it; mechanisms without "
        "attention weights are not applicable"
    )
    source = "Olsson et al., arXiv 2209.11895"
    needs = "text"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.text = setting.windows("heads")
        length = self.text.shape[1]
        if length <= SKIP:
            raise UsageError(
                f"heads needs windows of more than {SKIP} tokens, and they have {length}",
                hint=f"take --seq-len {2 * SKIP} or more",
            )
        self.twice, _, self.half = repeated(setting, setting.samples, "heads")

    def run(self, subjects: Sequence[Subject]) -> Answers:
        layers = range(subjects[0].layout.n_layers)
        text = self._collect(subjects, self.text, layers, _on_text)
        twice = self._collect(subjects, self.twice, layers, self._copying)
        queries = {"previous": self.text.shape[1] - 1, "induction": self.half - 1}
        answers: dict[str, list[Measure]] = {}
        for subject in subjects:
            mine = {
                layer: text[subject.name][layer] | twice[subject.name][layer]
                for layer in text[subject.name]
            }
            each = {"": self.text.shape[1] - SKIP, **queries}
            answers[subject.name] = [
                *_best(mine, "induction", each),
                *_best(mine, "previous", each),
                *_of_layers(mine, layers, each),
            ]
        return answers

    def _collect(
        self,
        subjects: Sequence[Subject],
        inputs: np.ndarray,
        layers: Sequence[int],
        read: Callable[[Observed], dict[str, Tensor]],
    ) -> dict[str, Numbers]:
        """`read` of each layer's attention, over all inputs, by subject."""
        parts: dict[str, dict[int, list[dict[str, np.ndarray]]]] = {s.name: {} for s in subjects}
        known: dict[str, frozenset[int]] = {}
        batch = -1

        def visit(name: str, seen: Observed) -> None:
            numbers = {stat: value.double().cpu().numpy() for stat, value in read(seen).items()}
            batches = parts[name].setdefault(seen.layer, [])
            if len(batches) == batch:
                batches.append({stat: np.full_like(x, np.nan) for stat, x in numbers.items()})
            heads = slice(None) if seen.heads is None else list(seen.heads)
            for stat, value in numbers.items():
                batches[-1][stat][:, heads] = value[:, heads]

        with torch.no_grad():
            for at in range(0, len(inputs), self.setting.batch_size):
                ids = on_device(subjects[0].layout, inputs[at : at + self.setting.batch_size])
                batch += 1
                known = observe_all(subjects, ids, layers, visit, some_heads=True)
        teacher = parts[subjects[0].name]
        return {
            name: {layer: _joined(parts[name].get(layer) or teacher[layer]) for layer in found}
            for name, found in known.items()
        }

    def _copying(self, seen: Observed) -> dict[str, Tensor]:
        weights = seen.weights()
        # The first token of the second copy cannot be predicted; the others attend to what followed in the first.
        at = torch.arange(weights.shape[-1] - self.half + 1, weights.shape[-1])
        return {"induction": weights[:, :, at, at - self.half + 1].mean(-1)}


def _on_text(seen: Observed) -> dict[str, Tensor]:
    weights = seen.weights()
    length = weights.shape[-1]
    at = torch.arange(1, length)
    found = {"previous": weights[:, :, at, at - 1].mean(-1)}
    late = weights[:, :, SKIP:]
    found["sink"] = late[..., 0].mean(-1)
    found["entropy"] = -torch.xlogy(late, late).sum(-1).mean(-1)
    apart = torch.arange(SKIP, length)[:, None] - torch.arange(length)
    apart = apart.to(late.device)
    rest = late[..., 1:] / late[..., 1:].sum(-1, keepdim=True).clamp_min(TINY)
    found["distance"] = (rest * apart[:, 1:].clamp(min=0)).sum(-1).mean(-1)
    starts = [0, *(2**i for i in range((length - 1).bit_length()))]
    for start, end in pairwise([*starts, length]):
        near = (apart[:, 1:] >= start) & (apart[:, 1:] < end)
        found[under(MASS, distance=start)] = (rest * near).sum(-1).mean(-1)
    return found


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Of all batches: `samples heads`, nan for heads without attention weights; `samples` for `mass`, of the others."""
    found = {stat: np.concatenate([part[stat] for part in parts]) for stat in parts[0]}
    for stat, values in found.items():
        if stat.startswith(MASS):
            found[stat] = values[:, ~np.isnan(values[0])].mean(1)
    return found


def _best(numbers: Numbers, stat: str, each: dict[str, int]) -> list[Measure]:
    """The head with the highest mean, wherever it is."""
    best: np.ndarray | None = None
    for found in numbers.values():
        for head in found[stat].T:
            if not np.isnan(head).any() and (best is None or head.mean() > best.mean()):
                best = head
    address = {"site": "attn_out"}
    if best is None:
        return [Measure.absent(f"best_{stat}", **address)]
    return [Measure.mean(f"best_{stat}", best, each[stat], **address)]


def _of_layers(numbers: Numbers, layers: Sequence[int], each: dict[str, int]) -> Iterator[Measure]:
    for layer in layers:
        if layer not in numbers:
            for stat in (*ON_TEXT, "induction"):
                yield Measure.absent(stat, layer=layer, site="attn_out")
            continue
        for stat, values in numbers[layer].items():
            size = each.get(stat, each[""])
            if values.ndim == 1:
                yield Measure.mean(stat, values, size, layer=layer, site="attn_out")
                continue
            for head, own in enumerate(values.T):
                address = {"layer": layer, "head": head, "site": "attn_out"}
                if np.isnan(own).any():
                    yield Measure.absent(stat, **address)
                else:
                    yield Measure.mean(stat, own, size, **address)
