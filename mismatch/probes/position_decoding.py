"""Can the position of a token be read off the stream? A ridge regression from each site.

Definition: y = position of the token, X = its vector at a site, of text; position 0 and massive tokens are left out. A
ridge regression (channels standardised, lambda = 1 % of the number of tokens) is fitted on the windows of three
quarters of the documents and tested on the others: `r2` = 1 - SSE / SST, SST around the mean of training.
`r2_shuffled`: the same with positions permuted at random among the training tokens. `distance_r2`: y = the distance
from one token to a later one of its window, X = the later vector minus the earlier; the earlier one is every token of
the first half, the distance is drawn evenly from 1 to half the window, so that the earlier token alone does not predict
it. `distance_r2_shuffled`: with the distances permuted at random. Sites: `attn_out` of up to six swapped layers,
`resid_post` of up to six layers from the first swapped one to the last.
Unit: share of variance. Range: (-inf, 1]. Null: the teacher against itself reads exactly 0 in every `_minus_teacher`.
Chance: r2_shuffled, about 0 or below.
Source: Kazemnejad et al., arXiv 2305.19466; Chi et al., arXiv 2305.13571 (the causal mask alone reveals position);
measured on SmolLM2-135M: .75, .73 and .50 at layers 13, 16 and 30, and as much without RoPE in layer 12.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mismatch.errors import UsageError
from mismatch.forward.hooks import on_device
from mismatch.forward.shared_prefix import finals
from mismatch.forward.sites import Tap, massive, taps
from mismatch.probes.base import Answers, Measure, Probe, Setting, Subject, swapped_layers

SITES = 6  # layers measured at most, for time
RIDGE = 0.01
TINY = 1e-12  # least variance of a channel that is scaled


class PositionDecoding(Probe):
    headline = "r2"
    unit = "share of variance"
    range = "(-inf, 1]"
    better = "none"
    chance = "r2_shuffled: positions permuted at random"
    shows = "whether the stream still holds position, however it came there"
    blind = (
        "whether anything uses it: a model without RoPE decodes as well, for the causal mask leaks "
        "position; only a linear function of the vector is fitted, so a distance only as the difference "
        "of two positions"
    )
    source = "arXiv 2305.19466, arXiv 2305.13571"
    needs = "text"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        count = len(setting.text)
        docs = np.unique(setting.docs[:count])
        held_out = docs[3 * len(docs) // 4 :]
        if len(docs) < 4:
            raise UsageError(
                f"position_decoding needs at least 4 documents, three to fit on and one to test on, and "
                f"there are {len(docs)}",
                hint="give more text, a smaller --seq-len, or leave this probe out",
            )
        tested = np.isin(setting.docs, held_out)
        self.train, self.test = setting.text[~tested], setting.text[tested]
        if len(self.test) < 2:
            raise UsageError(
                "position_decoding needs at least 2 windows to test on, and there is one",
                hint="give more text, or a smaller --seq-len",
            )

    def run(self, subjects: Sequence[Subject]) -> Answers:
        wanted = _wanted(subjects)
        decoders: dict[tuple[str, Tap, str], Decoder] = {}
        draw = self.setting.draw("position_decoding")
        length = self.train.shape[1]
        positions = np.tile(np.arange(1, length), (len(self.train), 1))
        permuted = draw.permutation(positions.reshape(-1)).reshape(positions.shape)
        gaps_train, gaps_test = (_gaps(len(part), length, draw) for part in (self.train, self.test))
        gaps_permuted = draw.permutation(gaps_train.reshape(-1)).reshape(gaps_train.shape)
        size = self.setting.batch_size
        with torch.no_grad():
            for at in range(0, len(self.train), size):
                part = slice(at, at + size)
                targets = {
                    "r2": np.stack([positions[part], permuted[part]], -1),
                    "distance_r2": np.stack([gaps_train[part], gaps_permuted[part]], -1),
                }

                def fit(
                    subject: Subject,
                    tap: Tap,
                    value: Tensor,
                    targets: dict[str, np.ndarray] = targets,
                    gaps: np.ndarray = gaps_train[part],
                ) -> None:
                    for stat, (x, kept) in _vectors(value, gaps).items():
                        y = torch.from_numpy(targets[stat]).double()
                        key = (subject.name, tap, stat)
                        if key not in decoders:
                            decoders[key] = Decoder(x.shape[-1])
                        decoders[key].update(x[kept], y[kept])

                for _ in finals(
                    subjects, on_device(subjects[0].layout, self.train[part]), wanted, fit
                ):
                    pass
            for decoder in decoders.values():
                decoder.solve()
            scored: dict[tuple[str, Tap, str], list[np.ndarray]] = {}

            for at in range(0, len(self.test), size):
                part = slice(at, at + size)

                def score(
                    subject: Subject, tap: Tap, value: Tensor, gaps: np.ndarray = gaps_test[part]
                ) -> None:
                    truth = {"r2": np.arange(1, length), "distance_r2": gaps}
                    for stat, (x, kept) in _vectors(value, gaps).items():
                        y = torch.from_numpy(truth[stat]).double().expand(kept.shape)
                        key = (subject.name, tap, stat)
                        scored.setdefault(key, []).append(decoders[key].score(x, y, kept))

                for _ in finals(
                    subjects, on_device(subjects[0].layout, self.test[part]), wanted, score
                ):
                    pass
        answers: dict[str, list[Measure]] = {subject.name: [] for subject in subjects}
        for (name, tap, stat), parts in scored.items():
            explained, shuffled, total, n = np.concatenate(parts).T
            address: dict[str, Any] = {"layer": tap.layer, "site": tap.site}
            answers[name] += [
                Measure(stat, explained, total, int(n.sum()), **address),
                Measure(f"{stat}_shuffled", shuffled, total, int(n.sum()), **address),
            ]
        return answers


def _gaps(windows: int, length: int, draw: np.random.Generator) -> np.ndarray:
    """How far behind the tokens 1, 2, .. of each window the second token of a pair stands: int64 `windows pairs`.

    Without pairs where windows are too short for distances to differ.
    """
    reach = (length - 1) // 2
    pairs = length - 1 - reach if reach > 1 else 0
    return draw.integers(1, reach + 1, (windows, pairs))


def _vectors(value: Tensor, gaps: np.ndarray) -> dict[str, tuple[Tensor, Tensor]]:
    """The vectors of each stat: float64 `windows n d_model`, and bool `windows n`, whether they count."""
    kept = _kept(value).cpu()
    x = value[:, 1:].double().cpu()
    found = {"r2": (x, kept)}
    if gaps.shape[1]:
        first = torch.arange(gaps.shape[1])
        second = first + torch.from_numpy(gaps)
        rows = torch.arange(len(x))[:, None]
        both = kept[:, first] & kept[rows, second]
        found["distance_r2"] = (x[rows, second] - x[:, first], both)
    return found


def _wanted(subjects: Sequence[Subject]) -> Callable[[Subject], list[Tap]]:
    """The sites of a subject; those inside a block that was replaced as a whole are not there."""
    swapped = swapped_layers(subjects)
    last = subjects[0].layout.n_layers - 1
    streams = _spread(range(min(swapped, default=last), last + 1))
    updates = _spread(swapped)

    def sites(subject: Subject) -> list[Tap]:
        found = []
        for layer in sorted({*streams, *updates}):
            for tap in taps(subject.layout, layer, inner=layer not in subject.whole_blocks):
                if (tap.site == "resid_post" and layer in streams) or (
                    tap.site == "attn_out" and layer in updates
                ):
                    found.append(tap)
        return found

    return sites


def _spread(layers: Sequence[int]) -> set[int]:
    """At most `SITES` of them, evenly, both ends included."""
    layers = list(layers)
    if len(layers) <= SITES:
        return set(layers)
    return {layers[round(i)] for i in np.linspace(0, len(layers) - 1, SITES)}


class Decoder:
    """Ridge regression of two targets at once, from sums: the true one, and the permuted one.

    Args:
        d: length of a vector.
    """

    weights: Tensor
    """Float64 `d 2`; from `solve`."""

    def __init__(self, d: int) -> None:
        self.n = 0
        self.sum_x = torch.zeros(d, dtype=torch.float64)
        self.sum_xx = torch.zeros(d, d, dtype=torch.float64)
        self.sum_xy = torch.zeros(d, 2, dtype=torch.float64)
        self.sum_y = torch.zeros(2, dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add float64 `rows d` and targets `rows 2`."""
        self.n += len(x)
        self.sum_x += x.sum(0)
        self.sum_xx += x.T @ x
        self.sum_xy += x.T @ y
        self.sum_y += y.sum(0)

    def solve(self) -> None:
        """Set the weights from the sums."""
        mean = self.sum_x / self.n
        cov = self.sum_xx / self.n - torch.outer(mean, mean)
        cross = self.sum_xy / self.n - torch.outer(mean, self.sum_y / self.n)
        scale = cov.diagonal().clamp_min(TINY).sqrt()
        cov = cov / torch.outer(scale, scale) + RIDGE * torch.eye(len(scale), dtype=torch.float64)
        self.weights = torch.linalg.solve(cov, cross / scale[:, None]) / scale[:, None]

    def score(self, x: Tensor, y: Tensor, kept: Tensor) -> np.ndarray:
        """Float64 `windows n d` against targets `windows n`, where `kept`.

        Returns:
            Per window SST - SSE, the same of the decoder of permuted targets, SST, and rows: `windows 4`.
        """
        middle = self.sum_y / self.n
        made = (x - self.sum_x / self.n) @ self.weights + middle
        total = ((y - middle[0]).square() * kept).sum(1)
        left = ((y[..., None] - made).square() * kept[..., None]).sum(1)
        return torch.stack([total - left[:, 0], total - left[:, 1], total, kept.sum(1)], -1).numpy()


def _kept(value: Tensor) -> Tensor:
    """bool `batch pos-1`: behind position 0, and not massive."""
    return ~massive(value, torch.ones(value.shape[:2], dtype=torch.bool, device=value.device))[
        :, 1:
    ]
