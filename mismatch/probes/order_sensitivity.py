"""Does this layer know the order of its input? Its prefix permuted, one layer alone.

Definition: the stream entering the layer in the teacher (the same for every model), positions 1 .. T-1-keep permuted;
`change` = ||update(permuted) - update|| / ||update|| of the last token, mean over windows of text; the update is what
attention adds (what the block adds, where it was replaced as a whole). keep = 1 permutes all but the last token, larger
values leave the nearest tokens where they are; with a swap in segments one of them leaves exactly its last segment, and
the permuted tokens are then those in the memory.
Unit: share of the update. Range: [0, inf). Null: the teacher against itself reads exactly 0 in `change_minus_teacher`.
Chance: 0 (float rounding, 3e-7): a layer without position is a sum over a set. Random weights read well above 0 as long
as they have RoPE: the probe asks whether order CAN act, not whether it helps.
Source: permutation equivariance of attention (Lee et al., arXiv 1810.00825, property 1); measured on SmolLM2-135M: .825
at layer 12 and 1.057 at layer 16, 3e-7 without RoPE. Nothing else separates the two as sharply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mismatch.forward.hooks import on_device
from mismatch.probes.base import Answers, Measure, Probe, Setting, Subject, swapped_layers
from mismatch.probes.forced import entering, update
from mismatch.runs.table import under

KEEP = (1, 16, 64)
"""Last tokens that are not permuted."""


class OrderSensitivity(Probe):
    headline = "change"
    unit = "share of the update"
    range = "[0, inf)"
    better = "none"
    chance = "0: a layer without position sees its prefix as a set"
    shows = "whether a layer sees the order of its input, exactly, before any training"
    blind = (
        "whether the order it sees is used further on; a causal mask separates early from late, which "
        "the last token alone does not show"
    )
    source = "permutation equivariance of attention, arXiv 1810.00825"
    needs = "text"
    by_batch = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.ids = setting.windows("order_sensitivity")

    def run(self, subjects: Sequence[Subject]) -> Answers:
        length = self.ids.shape[1]
        kept = {keep for keep in KEEP if keep < length - 2}
        # With segments: all that is before the last one, which is what a memory holds.
        kept |= {
            length - (length - 1) // s.segment * s.segment
            for s in subjects
            if s.segment is not None and s.segment < length - 1
        }
        draw = self.setting.draw("order_sensitivity")
        orders = {keep: self._orders(keep, draw) for keep in sorted(kept)}
        layers = swapped_layers(subjects)

        def one(part: slice) -> dict[tuple[str, int, int], np.ndarray]:
            pairs = {}
            ids = on_device(subjects[0].layout, self.ids[part])
            streams = entering(subjects[0].layout, ids, layers)
            for subject in subjects:
                for layer in layers:
                    stream = streams[layer]
                    plain = update(subject, layer, ids, stream)[:, -1].double()
                    for keep, order in orders.items():
                        rows = torch.from_numpy(order[part]).to(stream.device)
                        mixed = stream.gather(1, rows[..., None].expand_as(stream))
                        moved = update(subject, layer, ids, mixed)[:, -1].double() - plain
                        pair = torch.stack([moved.norm(dim=-1), plain.norm(dim=-1)], -1)
                        pairs[subject.name, layer, keep] = pair.cpu().numpy()
            return pairs

        with torch.no_grad():
            found = self.setting.by_batch(len(self.ids), one)
        answers: dict[str, list[Measure]] = {subject.name: [] for subject in subjects}
        for (name, layer, keep), pair in found.items():
            answers[name].append(self._measure(pair, layer, keep))
        return answers

    def _orders(self, keep: int, draw: np.random.Generator) -> np.ndarray:
        """int64 `samples pos`: position 0, the sink, and the last `keep` stay where they are."""
        count, length = self.ids.shape
        order = np.tile(np.arange(length), (count, 1))
        for row in order:
            row[1 : length - keep] = draw.permutation(row[1 : length - keep])
        return order

    def _measure(self, pair: np.ndarray, layer: int, keep: int) -> Measure:
        moved, plain = pair.T
        address: dict[str, Any] = {"layer": layer, "site": "attn_out", "mode": "forced"}
        stat = under("change", keep=keep)
        some = plain > 0
        if not some.any():  # a layer that adds nothing
            return Measure.absent(stat, **address)
        share = np.divide(moved, plain, out=np.zeros_like(moved), where=some)
        return Measure(stat, share, some.astype(float), int(some.sum()), **address)
