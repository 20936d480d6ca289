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
from mismatch.registry import did_you_mean, metrics, probes
from mismatch.runs.site_names import READ_AT, SITES


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
        "measurement": (
            "controls",
            "metrics",
            "sites",
            "moment_tokens",
            "probes",
            "backend",
            "seed",
        ),
        "output": (*OUTPUT, "fail_on"),
        "dangerous": DANGEROUS,
    }

    tokens: Annotated[int, ">= 1"] = 8192
    """Evaluation tokens."""
    batch_size: Annotated[int, ">= 1"] = 1
    """Windows per forward pass. More need more memory, and are no faster on a CPU."""
    metrics: tuple[str, ...] | None = None
    """Metrics to compute; all but js when not given. Named metrics of covariances are taken behind every block."""
    sites: tuple[str, ...] | None = None
    """Sites to measure, of resid_pre, attn_out, resid_mid, mlp_out, resid_post, final, logits; all when not given.
    Fewer need less time and memory. Findings rest on the sites that are there."""
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
        if self.sites is not None:
            self._check_sites(self.sites)

    def _check_sites(self, sites: tuple[str, ...]) -> None:
        if not sites:
            raise ConfigError("`sites` is empty", hint="leave it out to measure at all of them")
        for index, site in enumerate(sites):
            if site not in SITES:
                raise ConfigError(f"--sites: unknown site `{site}`", hint=did_you_mean(site, SITES))
            if site in sites[:index]:
                raise ConfigError(f"the site `{site}` is named twice")
        for metric in self.metrics or ():
            there = [site for site in SITES if metrics().card(metric).facts["at"] in READ_AT[site]]
            if not {*there} & {*sites}:
                raise ConfigError(
                    f"--metrics {metric} has no number at --sites {','.join(sites)}",
                    hint=f"it is taken at {', '.join(there)}",
                )
