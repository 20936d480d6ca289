"""Settings of `mismatch trace`. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from mismatch.config import (
    BUILDS_ON,
    DANGEROUS,
    MODEL,
    OUTPUT,
    SCORED_TEXT,
    CalibratedConfig,
    ScoredConfig,
    SwapConfig,
)
from mismatch.errors import ConfigError
from mismatch.registry import metrics, probes


@dataclass(frozen=True, kw_only=True)
class TraceConfig(CalibratedConfig, ScoredConfig, SwapConfig):
    """Settings of `mismatch trace`."""

    groups = {
        "model": MODEL,
        "swap": ("swap", "student"),
        "text": (
            *SCORED_TEXT,
            *("seq_len", "batch_size"),
            *BUILDS_ON,
        ),
        "measurement": ("controls", "metrics", "moment_tokens", "probes", "backend", "seed"),
        "output": (*OUTPUT, "fail_on"),
        "dangerous": DANGEROUS,
    }

    tokens: Annotated[int, ">= 1"] = 8192
    """Evaluation tokens."""
    batch_size: Annotated[int, ">= 1"] = 1
    """Windows per forward pass. More need more memory, and are no faster on a CPU."""
    metrics: tuple[str, ...] | None = None
    """Metrics to compute; all but js when not given. Named metrics of covariances are taken behind every block."""
    moment_tokens: Annotated[int, ">= 1"] = 2048
    """Tokens that feed the metrics of second moments (cka, frechet, ...)."""
    probes: tuple[str, ...] = ()
    """Probes to run behind the trace, with short inputs, into the same table (see `mismatch probe`)."""
    backend: Literal["hooks", "nnsight"] = "hooks"
    """How sites are read. Both give the same bits."""
    fail_on: Literal["low", "medium", "high"] | None = None
    """Exit with 3 when a finding is at least this severe."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._known(self.metrics or (), metrics())
        self._known(self.probes, probes())
        if self.metrics == ():
            raise ConfigError("`metrics` is empty", hint="leave it out to compute the usual ones")
