"""Can the position of a token be read off the stream? A ridge regression from each site.

Definition: y = position of the token, X = its vector at a site, of text; position 0 and massive tokens are left out. A
ridge regression (channels standardised, lambda = 1 % of the number of tokens) learns on the windows of three quarters
of the documents and is judged on the others: `r2` = 1 - SSE / SST, SST around the mean of training. `r2_shuffled`:
the same with positions dealt out at random among the training tokens. Sites: `attn_out` of up to six swapped layers,
`resid_post` of up to six layers from the first swapped one to the last.
Unit: share of variance. Range: (-inf, 1]. Null: the teacher against itself reads exactly 0 in every `_minus_teacher`.
Chance: r2_shuffled, about 0 or below.
Source: Kazemnejad et al., arXiv 2305.19466; Chi et al., arXiv 2305.13571 (the causal mask alone gives position away);
measured on SmolLM2-135M: .75, .73 and .50 at layers 13, 16 and 30, and as much without RoPE in layer 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mismatch.errors import UsageError
from mismatch.probes.base import Answers, Measure, Probe, Setting, Subject, swapped_layers
from mismatch.probes.scoring import finals, on
from mismatch.tracing.sites import Tap, massive, taps

SITES = 6
RIDGE = 0.01


class PositionDecoding(Probe):
    headline = "r2"
    unit = "share of variance"
    range = "(-inf, 1]"
    better = "none"
    chance = "r2_shuffled: positions dealt out at random"
    tells = "whether position is still written in the stream, by whatever way it came there"
    blind = (
        "whether anything uses it: a model without RoPE decodes as well, for the causal mask leaks "
        "position; no more than a line of the vector is read"
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
                f"position_decoding needs at least 4 documents, three to learn on and one to be judged on, and "
                f"there are {len(docs)}",
                hint="give more text, a smaller --seq-len, or leave this probe out",
            )
        judged = np.isin(setting.docs, held_out)
        self.train, self.test = setting.text[~judged], setting.text[judged]
        if len(self.test) < 2:
            raise UsageError(
                "position_decoding needs at least 2 windows to be judged on, and there is one",
                hint="give more text, or a smaller --seq-len",
            )

    def run(self, subjects: Sequence[Subject]) -> Answers:
        wanted = _wanted(subjects)
        decoders: dict[tuple[str, Tap], Decoder] = {}
        draw = self.setting.draw("position_decoding")
        shape = (len(self.train), self.train.shape[1] - 1)
        places = np.tile(np.arange(1, self.train.shape[1]), (len(self.train), 1))
        dealt = draw.permutation(places.reshape(-1)).reshape(shape)
        size = self.setting.batch_size
        with torch.no_grad():
            for at in range(0, len(self.train), size):
                targets = np.stack([places[at : at + size], dealt[at : at + size]], -1)

                def learn(
                    subject: Subject, tap: Tap, value: Tensor, y: np.ndarray = targets
                ) -> None:
                    decoder = decoders.setdefault((subject.name, tap), Decoder())
                    decoder.update(value, torch.from_numpy(y))

                for _ in finals(
                    subjects, on(subjects[0].layout, self.train[at : at + size]), wanted, learn
                ):
                    pass
            for decoder in decoders.values():
                decoder.solve()
            judged: dict[tuple[str, Tap], list[np.ndarray]] = {}

            def judge(subject: Subject, tap: Tap, value: Tensor) -> None:
                key = (subject.name, tap)
                judged.setdefault(key, []).append(decoders[key].judge(value))

            for at in range(0, len(self.test), size):
                for _ in finals(
                    subjects, on(subjects[0].layout, self.test[at : at + size]), wanted, judge
                ):
                    pass
        answers: dict[str, list[Measure]] = {subject.name: [] for subject in subjects}
        for (name, tap), parts in judged.items():
            explained, dealt_, total, n = np.concatenate(parts).T
            address = {"layer": tap.layer, "site": tap.site}
            answers[name] += [
                Measure("r2", explained, total, int(n.sum()), **address),
                Measure("r2_shuffled", dealt_, total, int(n.sum()), **address),
            ]
        return answers


def _wanted(subjects: Sequence[Subject]):
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


@dataclass
class Decoder:
    """Ridge regression of two targets at once, from sums: the position, and the dealt one."""

    n: int = 0
    sum_x: Tensor | None = None
    sum_xx: Tensor | None = None
    sum_xy: Tensor | None = None
    sum_y: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    weights: Tensor | None = None

    def update(self, value: Tensor, targets: Tensor) -> None:
        """Learn from `batch pos d_model` and targets `batch pos-1 2`."""
        kept = _kept(value)
        x = value[:, 1:][kept].double().cpu()
        y = targets[kept.cpu()].double()
        if self.sum_x is None:
            d = x.shape[1]
            self.sum_x = torch.zeros(d, dtype=torch.float64)
            self.sum_xx = torch.zeros(d, d, dtype=torch.float64)
            self.sum_xy = torch.zeros(d, 2, dtype=torch.float64)
        self.n += len(x)
        self.sum_x += x.sum(0)
        self.sum_xx += x.T @ x
        self.sum_xy += x.T @ y
        self.sum_y += y.sum(0)

    def solve(self) -> None:
        mean = self.sum_x / self.n
        cov = self.sum_xx / self.n - torch.outer(mean, mean)
        cross = self.sum_xy / self.n - torch.outer(mean, self.sum_y / self.n)
        scale = cov.diagonal().clamp_min(1e-12).sqrt()
        cov = cov / torch.outer(scale, scale) + RIDGE * torch.eye(len(scale), dtype=torch.float64)
        self.weights = torch.linalg.solve(cov, cross / scale[:, None]) / scale[:, None]

    def judge(self, value: Tensor) -> np.ndarray:
        """Per window: SST - SSE of the position, of the dealt decoder, SST, tokens: `batch 4`."""
        kept = _kept(value).cpu()
        x = value[:, 1:].double().cpu()
        y = torch.arange(1, value.shape[1], dtype=torch.float64).expand(len(x), -1)
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
