"""What a trace will need, worked out before any weight is loaded. Orders of magnitude, said as such."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mismatch.config import RunConfig
from mismatch.forward.head import chunk_of
from mismatch.forward.sites import tapped
from mismatch.models.layout import Layout
from mismatch.models.target import to_disk
from mismatch.runs.site_names import BLOCK_SITES, SITES
from mismatch.stages.trace.config import TraceConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 4}
PROCESS = 800_000_000  # bytes of Python, its libraries and freed pages; measured
COPIES = 2.5  # of the teacher's values behind the swap, in sums and students; measured, 1,024 to 8,192 tokens a batch
MOMENTS = (
    12  # places of second moments beside those that are asked for, of one swapped layer; measured
)
EFFICIENCY = (
    0.4  # of a large matrix product; measured on SmolLM2, blocks of 1024 tokens, 2 CPU cores
)


@dataclass(frozen=True)
class Estimate:
    """Bytes, seconds and floating-point operations that a trace will take."""

    weights: int
    peak: int
    flops: float
    seconds: float

    def lines(self) -> list[str]:
        return [
            f"memory  about {_gb(self.peak)} GB, of which weights {_gb(self.weights)} GB",
            f"time    about {_minutes(self.seconds)} on this machine ({self.flops / 1e12:.3g} TFLOP)",
        ]


def estimate(
    skeleton: Layout,
    first_layers: Sequence[int | None],
    config: TraceConfig,
    tokens: int | None = None,
) -> Estimate:
    """Estimate a trace.

    Args:
        skeleton: layout of the model on the meta device.
        first_layers: the first swapped layer of each student (None: only the final norm).
        config: tokens, batch size, dtype.
        tokens: that there are; None: as many as are asked for.
    """
    size = BYTES[config.dtype]
    layers, d, vocab = skeleton.n_layers, skeleton.d_model, skeleton.vocab
    weights = resident(skeleton, config)
    head = vocab * d
    inside = sum(p.numel() for p in skeleton.blocks.parameters())
    attention = layers * config.seq_len * d  # scores and their use, causal: half of 4 T d per token
    block = (2 * inside + 2 * attention) / layers
    starts = [layers if first is None else first for first in first_layers]
    per_token = layers * block + 2 * head + sum((layers - s) * block + 2 * head for s in starts)
    flops = per_token * (tokens or config.tokens) * 1.25
    shown = layers - min(starts, default=0)
    kept = tapped(skeleton, config.sites or SITES).intersection(BLOCK_SITES)
    sites = shown * len(kept) * config.batch_size * config.seq_len * d * 4
    heads = 5 * chunk_of(skeleton) * vocab * 4
    places = MOMENTS if config.metrics is None else MOMENTS + shown  # named: behind every block
    moments = 4 * places * d * d * 8
    wide = 0 if size == 4 or to_disk(config.device_map) else 4 * (head + inside // layers)
    peak = PROCESS + weights + int(COPIES * sites) + heads + moments + wide
    return Estimate(weights, peak, flops, flops / (speed() * EFFICIENCY))


def resident(skeleton: Layout, config: RunConfig) -> int:
    """Bytes of weights that are in memory at once: all but those on disk, of which one part is."""
    size, on_disk = BYTES[config.dtype], to_disk(config.device_map)
    inside = [
        sum(p.numel() for p in skeleton.model.get_submodule(name).parameters()) for name in on_disk
    ]
    every = sum(p.numel() for p in skeleton.model.parameters())
    return size * (every - sum(inside) + max(inside, default=0))


def speed() -> float:
    """Floating-point operations a second of a matrix product on the device that will be used."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(768, 768, device=device)
    a @ a
    start = time.perf_counter()
    for _ in range(8):
        b = a @ a
    float(b[0, 0])  # waits for the device
    return 8 * 2 * 768**3 / (time.perf_counter() - start)


def _gb(n: int) -> str:
    return f"{n / 1e9:.1f}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"
