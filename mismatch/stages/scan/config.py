"""Settings of `mismatch scan`. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from mismatch import spec
from mismatch.config import (
    DANGEROUS,
    MODEL,
    OUTPUT,
    SCORED_TEXT,
    CalibratedConfig,
    RunConfig,
    ScoredConfig,
    fields,
)
from mismatch.errors import ConfigError
from mismatch.registry import did_you_mean

TASKS = ("text", "induction", "passkey", "needles", "kv_lookup")
"""The tasks of each cell, in this order: see `mismatch.stages.scan.tasks`."""


HEADS_OF = {"head": "heads", "kv-head": "kv_heads"}
"""The word of the swap for what `--by` says."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(CalibratedConfig, ScoredConfig):
    """What is measured of every cell, by a scan and by a plan."""

    controls: tuple[str, ...] = ("zero",)
    """Controls in the same layers and slots; none for no control."""
    tokens: Annotated[int, ">= 1"] = 4096
    """Evaluation tokens of the task text."""
    seq_len: Annotated[int, ">= 2"] = 512
    """Tokens per window. A window never mixes documents."""
    scored: Annotated[float, "0.001..1"] = 0.3
    """Share of the evaluation tokens whose predictions are compared, for the head is costly. A trace compares all."""
    samples: Annotated[int, ">= 2"] = 8
    """Sequences of induction, prompts of passkey, needles and kv_lookup. With fewer than 8 the intervals are too
    narrow."""
    length: Annotated[int, ">= 1"] = 256
    """Tokens of a prompt of passkey, needles and kv_lookup."""
    depth: Annotated[float, "0..1"] = 0.1
    """Where the passkey, or the needle that is asked for, stands: 0 is the start of the prompt, 1 its end."""

    def fitted(self, context: int | None) -> Self:
        made = super().fitted(context)
        usual = fields(type(self))["length"].default
        if context is None or self.length != usual or usual <= context:
            return made
        return dataclasses.replace(made, length=context)


@dataclass(frozen=True, kw_only=True)
class ScanConfig(SweepConfig):
    """Settings of `mismatch scan`."""

    groups = {
        "model": MODEL,
        "cells": ("swap", "among", "by", "controls"),
        "tasks": ("tasks", "scored", "samples", "length", "depth"),
        "text": (
            *SCORED_TEXT,
            *("seq_len", "batch_size", "seed"),
        ),
        "output": OUTPUT,
        "dangerous": DANGEROUS,
    }
    examples = {**RunConfig.examples, "swap": '--swap "infini(segment=64); nope; zero"'}

    swap: tuple[str, ...]
    """Mechanisms, without a target: each goes into every layer, one layer at a time. May be repeated."""
    among: str = "all"
    """Layers to go through: all, or ranges such as 0-9, 0,4,8, 0-last/2."""
    by: Literal["layer", "head", "kv-head"] = "layer"
    """What is replaced at a time: a layer, one of its query heads, or the query heads of one of its kv heads."""
    tasks: tuple[str, ...] | None = None
    """Tasks of each cell: text, induction, passkey, needles, kv_lookup. All that this model can do when not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.swap:
            raise ConfigError(
                "there is no swap", hint=f"give mechanisms, such as {self.examples['swap']}"
            )
        for template in spec.templates(self.swap):
            if self.by != "layer":
                spec.check(template.at(0, HEADS_OF[self.by], 0))
        spec.parse_layers(self.among)
        for index, name in enumerate(self.tasks or ()):
            if name not in TASKS:
                raise ConfigError(f"unknown task `{name}`", hint=did_you_mean(name, TASKS))
            if name in (self.tasks or ())[:index]:
                raise ConfigError(f"the task `{name}` is named twice")
        if self.tasks == ():
            raise ConfigError("`tasks` is empty", hint="leave it out for all of them")

    def foreign(self) -> Iterator[tuple[str, str]]:
        yield from super().foreign()
        for template in self.templates:
            yield from (("swap", name) for name in template.call.foreign())

    @property
    def templates(self) -> tuple[spec.Template, ...]:
        """The parsed mechanisms."""
        return spec.templates(self.swap)

    @property
    def subject(self) -> str:
        return "; ".join(str(template) for template in self.templates)

    def canonical(self) -> dict[str, str]:
        return {"swap": self.subject}
