"""Settings of `mismatch plan`. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from mismatch import spec
from mismatch.config import DANGEROUS, MODEL, OUTPUT, RunConfig, fields
from mismatch.errors import ConfigError
from mismatch.stages.plan.scores import SCORES
from mismatch.stages.scan.config import ScanConfig, SweepConfig

GREEDY = ("kl", "answer_nll")
"""Scores that are what a set costs."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(SweepConfig):
    """Settings of `mismatch plan`."""

    groups = {
        "model": MODEL,
        "choice": (
            *("mechanism", "layers", "among", "budget_kl", "keep_retrieval", "budget_retrieval"),
            *("score", "method", "scan", "controls"),
        ),
        "tasks": ("scored", "samples", "length", "depth"),
        "text": (
            *("data", "text_field", "answers_only", "tokens", "selection_tokens"),
            *("calibration_data", "calibration_tokens"),
            *("seq_len", "batch_size", "seed", "allow_overlap"),
        ),
        "output": OUTPUT,
        "dangerous": DANGEROUS,
    }
    examples = {**RunConfig.examples, "mechanism": "--mechanism infini"}

    mechanism: str
    """What to put into the layers, without a target. Of several, joined by `;`, each layer gets the cheapest."""
    layers: Annotated[int, ">= 1"] | None = None
    """How many layers to replace; as many as the budget allows when not given."""
    among: str = "all"
    """Layers that may be replaced: all, or ranges such as 4-last."""
    tokens: Annotated[int, ">= 1"] = 4096
    """Evaluation tokens of the chosen set: documents that chose nothing."""
    selection_tokens: Annotated[int, ">= 1"] = 4096
    """Selection tokens, of the same source: what the layers are chosen on."""
    allow_overlap: bool = False
    """Evaluate on documents that chose the layers where no other is left. The report says how many there are."""
    budget_kl: Annotated[float, "> 0"] | None = None
    """Highest KL of all chosen layers together, in nats per token."""
    keep_retrieval: bool = False
    """Leave out layers that carry retrieval: the passkey may lose no more than --budget-retrieval."""
    budget_retrieval: Annotated[float, "> 0"] = 0.5
    """What the passkey may lose with --keep-retrieval, nats per key."""
    score: Literal["kl", "answer_nll", "restore_one", "gates", "halo", "even", "random"] = "kl"
    """What the layers are chosen by: the KL of text when a layer alone is replaced; the rise of the NLL of answers to
    retrieval prompts; the KL regained when all are replaced and one is given back; gates between both modules, learnt
    on answers; HALO's ratio of retrieval to text; evenly spaced layers, or layers at random, as baselines."""
    method: Literal["milp", "greedy"] = "milp"
    """milp: the best choice if costs add up, from one scan. greedy: a new scan after every chosen layer."""
    scan: str | None = None
    """Run folder of a finished scan to choose from, in place of a new one. Not with greedy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        spec.templates(self.mechanism)
        spec.parse_layers(self.among)
        if self.layers is None and self.budget_kl is None:
            raise ConfigError(
                "the number of layers to replace is not given",
                hint="give --layers 8, or --budget-kl 0.5 for as many as that allows",
            )
        kind = SCORES[self.score]
        if not kind.scanned:
            self._alone()
        if self.method == "greedy" and self.score not in GREEDY:
            raise ConfigError(
                f"greedy adds what a layer costs to those before, and {self.score} is no such cost",
                hint=f"take --score {' or '.join(GREEDY)}, or --method milp",
            )
        if self.scan is not None and self.method == "greedy":
            raise ConfigError(
                "greedy scans anew after every layer; a finished scan cannot stand for that",
                hint="leave out --scan, or take --method milp",
            )
        for name in ("tokens", "selection_tokens"):
            flag, tokens = f"--{name.replace('_', '-')}", getattr(self, name)
            if tokens < self.seq_len:
                raise ConfigError(
                    f"{flag} {tokens} is less than one window of --seq-len {self.seq_len}",
                    hint=f"take {flag} {self.seq_len} or more, or a shorter --seq-len",
                )

    def _alone(self) -> None:
        """Scores that know of no single layer's cost: what needs it is refused.

        Raises:
            ConfigError: a budget, a scan, no number of layers, several mechanisms.
        """
        given = {
            "--budget-kl": self.budget_kl is not None,
            "--keep-retrieval": self.keep_retrieval,
            "--scan": self.scan is not None,
        }
        if wrong := [flag for flag, there in given.items() if there]:
            raise ConfigError(
                f"--score {self.score} makes no scan of layers one at a time, which {wrong[0]} is about",
                hint=f"leave {wrong[0]} out, or take --score {' or '.join(GREEDY)}",
            )
        if self.layers is None:
            raise ConfigError(
                f"--score {self.score} ranks layers, and how many to take is not given",
                hint="give --layers 8",
            )
        if len(self.templates) > 1:
            raise ConfigError(
                f"--score {self.score} chooses layers for one mechanism, got {len(self.templates)}",
                hint="plan them one after the other",
            )

    def foreign(self) -> Iterator[tuple[str, str]]:
        yield from super().foreign()
        for template in self.templates:
            yield from (("mechanism", name) for name in template.call.foreign())

    @property
    def templates(self) -> tuple[spec.Template, ...]:
        """The parsed mechanisms."""
        return spec.templates(self.mechanism)

    @property
    def makes_scan(self) -> bool:
        """Whether a scan of layers one at a time is made for it."""
        return self.scan is None and self.method == "milp" and SCORES[self.score].scanned

    @property
    def mechanism_text(self) -> str:
        """The mechanisms in their canonical form."""
        return "; ".join(str(template) for template in self.templates)

    @property
    def subject(self) -> str:
        count = "" if self.layers is None else f"{self.layers} layers of "
        return f"plan {count}{self.mechanism_text}"

    def canonical(self) -> dict[str, str]:
        return {"mechanism": self.mechanism_text}

    def scan_config(self) -> ScanConfig:
        """The scan that the choice is made from: the mechanisms alone, for controls do not choose."""
        own = ("controls", "tokens", "output", "run_name")
        shared = {name: getattr(self, name) for name in fields(SweepConfig) if name not in own}
        return ScanConfig(
            **shared,
            swap=(self.mechanism,),
            among=self.among,
            tokens=self.selection_tokens,
            controls=(),
        )
