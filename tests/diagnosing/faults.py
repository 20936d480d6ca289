"""Faults planted into an attention: the original's own output, spoilt in one known way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mismatch.mechanisms.base import Context, Wrapper
from mismatch.mechanisms.calling import first_of, with_first
from mismatch.registry import mechanisms


@dataclass(frozen=True)
class FaultConfig:
    """Which fault."""

    kind: str = "same"
    """Its name."""


class Fault(Wrapper):
    """The original with one thing wrong."""

    Config = FaultConfig
    slots = ("attn",)
    identity = "kind=same"
    state = "the original's"
    source = "tests"

    def __init__(self, original: Any, config: FaultConfig, context: Context) -> None:
        super().__init__(original, config, context)
        draw = torch.Generator().manual_seed(0)
        d = context.d_model
        self.turn = torch.linalg.qr(torch.randn(d, d, generator=draw))[0]
        self.shift = torch.randn(d, generator=draw)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.settings.kind == "head":
            return self._without_head(args, kwargs)
        out = self.original(*args, **kwargs)
        return with_first(out, self._spoilt(first_of(out)))

    def _spoilt(self, y: torch.Tensor) -> torch.Tensor:
        usual = y[:, 1:].norm(dim=-1, keepdim=True).mean(1, keepdim=True)
        unit = self.shift / self.shift.norm()
        match self.settings.kind:
            case "scaled":
                return 2 * y
            case "rotated":
                return y @ self.turn
            case "shifted":
                return y + 5 * self.shift / self.shift.norm()
            case "delayed":
                return torch.cat([y[:, :1], y[:, :-1]], 1)
            case "first":
                return torch.cat([y[:, :1] + 20 * usual * unit, y[:, 1:]], 1)
            case "sizes":  # every token a size of its own, none of them twice
                at = torch.arange(y.shape[1])
                return y * torch.exp(torch.sin(12.9898 * at) * 2)[:, None]
        return y

    def _without_head(self, args: tuple, kwargs: dict) -> Any:
        width = self.original.o_proj.in_features // self.original.config.num_attention_heads

        def drop(_module: Any, given: tuple) -> tuple:
            z = given[0].clone()
            z[..., width : 2 * width] = 0
            return (z,)

        handle = self.original.o_proj.register_forward_pre_hook(drop, prepend=True)
        try:
            return self.original(*args, **kwargs)
        finally:
            handle.remove()


def plant() -> None:
    """Make `fault` a mechanism."""
    mechanisms().add("fault", Fault)
