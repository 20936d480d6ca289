"""What `mismatch diagnose` is told. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mismatch.config import SwapConfig
from mismatch.errors import ConfigError

WINDOWS = 4
"""Fewer windows of calibration text cannot both fit and choose."""


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(SwapConfig):
    """What `mismatch diagnose` is told."""

    controls: tuple[str, ...] = ("zero",)
    """Controls that stand in the same places, to say what the damage is worth; none for no control."""
    tokens: Annotated[int, ">= 1"] = 8192
    """Tokens of the calibration text that corrections are fitted on."""
    judged: Annotated[int, ">= 1"] = 3072
    """Held-out tokens that they are judged on."""
    seq_len: Annotated[int, ">= 8"] = 384
    """Tokens per window. A window never mixes documents."""
    batch_size: Annotated[int, ">= 1"] = 2
    """Windows per forward pass."""
    scored: Annotated[float, "0.001..1"] = 0.2
    """Share of the held-out tokens whose predictions are compared, the same for all: the head is costly."""
    heads: Annotated[int, ">= 0"] = 3
    """Heads that are given back one by one: those whose return mends most of the update."""
    evidence: str | None = None
    """Run folder of a trace or of probes of the same swap, whose readings are put beside."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < WINDOWS * self.seq_len:
            raise ConfigError(
                f"--tokens {self.tokens} are {self.tokens // self.seq_len} windows of --seq-len {self.seq_len}; "
                f"corrections are fitted on {WINDOWS} or more",
                hint=f"take --tokens {WINDOWS * self.seq_len} or more, or a shorter --seq-len",
            )
