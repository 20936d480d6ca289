"""Settings of `mismatch diagnose`. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mismatch.config import BUILDS_ON, DANGEROUS, MODEL, OUTPUT, CalibratedConfig, SwapConfig
from mismatch.errors import ConfigError

WINDOWS = 4
"""Fewer windows of calibration text cannot both fit and choose."""


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(CalibratedConfig, SwapConfig):
    """Settings of `mismatch diagnose`."""

    groups = {
        "model": MODEL,
        "swap": ("swap", "student", "controls"),
        "diagnosis": ("fit_tokens", "scored", "heads", "earlier_run"),
        "text": (
            *("data", "text_field", "tokens", "calibration_data", "calibration_tokens"),
            *("seq_len", "batch_size", "seed"),
            *BUILDS_ON,
        ),
        "output": OUTPUT,
        "dangerous": DANGEROUS,
    }

    controls: tuple[str, ...] = ("zero",)
    """Controls in the same layers and slots, which the damage is compared with; none for no control."""
    tokens: Annotated[int, ">= 1"] = 3072
    """Evaluation tokens: every correction is measured on them."""
    fit_tokens: Annotated[int, ">= 1"] = 8192
    """Tokens of the calibration text that corrections are fitted on."""
    seq_len: Annotated[int, ">= 8"] = 384
    """Tokens per window. A window never mixes documents."""
    batch_size: Annotated[int, ">= 1"] = 2
    """Windows per forward pass."""
    scored: Annotated[float, "0.001..1"] = 0.2
    """Share of the evaluation tokens whose predictions are compared, the same for all: the head is costly."""
    heads: Annotated[int, ">= 0"] = 3
    """Heads that are corrected one by one: those whose correction recovers most of the update."""
    earlier_run: str | None = None
    """Run folder of a trace or of probes of the same swap, whose retrieval and copying are shown beside."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit_tokens < WINDOWS * self.seq_len:
            raise ConfigError(
                f"--fit-tokens {self.fit_tokens} are {self.fit_tokens // self.seq_len} windows of --seq-len "
                f"{self.seq_len}; corrections are fitted on {WINDOWS} or more",
                hint=f"take --fit-tokens {WINDOWS * self.seq_len} or more, or a shorter --seq-len",
            )
