"""What `mismatch plan` is told. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from mismatch import spec
from mismatch.config import RunConfig
from mismatch.errors import ConfigError
from mismatch.stages.scan.config import ScanConfig, SweepConfig


@dataclass(frozen=True, kw_only=True)
class PlanConfig(SweepConfig):
    """What `mismatch plan` is told."""

    examples = {**RunConfig.examples, "mechanism": "--mechanism infini"}

    mechanism: str
    """What to put into the layers, without a target. Of several, joined by `;`, each layer gets the cheapest."""
    layers: Annotated[int, ">= 1"] | None = None
    """How many layers to replace; as many as the budget allows when not given."""
    among: str = "all"
    """Layers that may be replaced: all, or ranges such as 4-last."""
    budget_kl: Annotated[float, "> 0"] | None = None
    """Most KL that the layers together should cost, nats per token."""
    keep_retrieval: bool = False
    """Leave layers alone that carry retrieval: the passkey may lose no more than --budget-retrieval."""
    budget_retrieval: Annotated[float, "> 0"] = 0.5
    """What the passkey may lose with --keep-retrieval, nats per key."""
    method: Literal["milp", "greedy"] = "milp"
    """milp: the best choice if costs add up, from one scan. greedy: a scan after every layer that was taken."""
    scan: str | None = None
    """Run folder of a finished scan to choose from, in place of a new one. Not with greedy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        spec.templates(self.mechanism)
        spec.parse_layers(self.among)
        if self.layers is None and self.budget_kl is None:
            raise ConfigError(
                "nothing says how many layers to replace",
                hint="give --layers 8, or --budget-kl 0.5 for as many as that allows",
            )
        if self.scan is not None and self.method == "greedy":
            raise ConfigError(
                "greedy scans anew after every layer; a finished scan cannot stand for that",
                hint="leave out --scan, or take --method milp",
            )

    @property
    def templates(self) -> tuple[spec.Template, ...]:
        """The parsed mechanisms."""
        return spec.templates(self.mechanism)

    @property
    def mechanism_text(self) -> str:
        """The mechanisms in their canonical form."""
        return "; ".join(str(template) for template in self.templates)

    def canonical(self) -> dict[str, str]:
        return {"mechanism": self.mechanism_text}

    def scan_config(self) -> ScanConfig:
        """The scan that the choice is made from: the mechanisms alone, for controls do not choose."""
        shared = {
            name: value
            for name, value in self.to_dict().items()
            if name in _SHARED and name not in ("controls", "output", "run_name")
        }
        return ScanConfig(**shared, swap=(self.mechanism,), layers=self.among, controls=())


_SHARED = set(SweepConfig.__dataclass_fields__)
