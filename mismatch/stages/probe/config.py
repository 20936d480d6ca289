"""Settings of `mismatch probe`. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Self

from mismatch.config import (
    BUILDS_ON,
    DANGEROUS,
    MODEL,
    OUTPUT,
    CalibratedConfig,
    SwapConfig,
    fields,
)
from mismatch.errors import ConfigError
from mismatch.registry import probes

WINDOWS = 4
"""Windows of text per sample of a probe: a decoder trains on three quarters of them and is evaluated on the rest."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(CalibratedConfig, SwapConfig):
    """Settings of `mismatch probe`."""

    groups = {
        "model": MODEL,
        "swap": ("swap", "student"),
        "probes": (
            *("probes", "controls", "samples", "lengths", "depths"),
            *("lookup_pairs", "lookup_length"),
            *("planned_gate_lr", "planned_gate_steps"),
        ),
        "text": (
            *("data", "text_field", "calibration_data", "calibration_tokens"),
            *("seq_len", "batch_size", "seed"),
            *BUILDS_ON,
        ),
        "output": OUTPUT,
        "dangerous": DANGEROUS,
    }

    controls: tuple[str, ...] = ("zero",)
    """Controls that get the same inputs; none for no control."""
    probes: tuple[str, ...] | None = None
    """Probes to run; all of them when not given."""
    samples: Annotated[int, ">= 2"] = 8
    """Prompts of each kind, and windows of text. With fewer than 8 the intervals are too narrow."""
    seq_len: Annotated[int, ">= 32"] = 160
    """Tokens per window of evaluation text."""
    lengths: tuple[str, ...] = ("256", "512", "1024")
    """Tokens of the prompts of passkey and needles; by default those of them that the model's context holds."""
    depths: tuple[str, ...] = ("0.1", "0.5", "0.9")
    """Where the passkey, or the needle that is asked for, stands: 0 is the start of the prompt, 1 its end."""
    lookup_pairs: Annotated[int, ">= 1"] = 12
    """Pairs of a kv_lookup list; the more there are, the less a small model reads."""
    lookup_length: Annotated[int, ">= 1"] = 328
    """Tokens of a kv_lookup prompt; by default no more than the model's context."""
    planned_gate_lr: float | None = None
    """Peak learning rate planned for gates (cosine schedule): decides how far they can move."""
    planned_gate_steps: Annotated[int, ">= 1"] = 1000
    """Steps of that plan."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._known(self.probes or (), probes())
        if self.probes == ():
            raise ConfigError("`probes` is empty", hint="leave it out to run all of them")
        for name, kind, fits in (
            ("lengths", int, lambda x: x >= 1),
            ("depths", float, lambda x: 0 <= x <= 1),
        ):
            given = getattr(self, name)
            if not given:
                raise ConfigError(f"`{name}` is empty", hint="leave it out for the usual ones")
            if len(set(given)) < len(given):
                raise ConfigError(f"`{name}` names a value twice: {', '.join(given)}")
            for text in given:
                if not _reads(kind, fits, text):
                    what = "whole numbers >= 1" if kind is int else "numbers in 0..1"
                    raise ConfigError(f"`{name}` must be {what}, got `{text}`")

    def fitted(self, context: int | None) -> Self:
        made = super().fitted(context)
        if context is not None and made != self:  # a probe moves the text, and needs room for that
            made = dataclasses.replace(made, seq_len=max(3 * context // 4, 32))
        usual = fields(type(self))
        if context is not None and made.lookup_length == usual["lookup_length"].default:
            made = dataclasses.replace(made, lookup_length=min(made.lookup_length, context))
        if context is None or made.lengths != usual["lengths"].default:
            return made
        short = tuple(text for text in made.lengths if int(text) <= context)
        return dataclasses.replace(made, lengths=short or (str(context),))

    @property
    def tokens(self) -> int:
        """Evaluation tokens: windows to train a decoder on, and as many as there are samples to evaluate it on."""
        return WINDOWS * self.samples * self.seq_len

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of the passkey prompts."""
        return tuple(int(text) for text in self.lengths)

    @property
    def prompt_depths(self) -> tuple[float, ...]:
        """Where the passkey stands in them."""
        return tuple(float(text) for text in self.depths)


def _reads(kind: type, fits: Callable[[Any], bool], text: str) -> bool:
    try:
        return fits(kind(text))
    except ValueError:
        return False
