"""What every mechanism with slots and sinks owes to repair and probes: its learned scores, and the first token back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mismatch.mechanisms.parts.calling import hidden_in
from mismatch.mechanisms.parts.far_attention import far_attention
from mismatch.mechanisms.parts.projections import AttentionParts
from mismatch.mechanisms.parts.slots import Slots


class Choosing(AttentionParts):
    """A mechanism over an attention whose settings have `segment`, `overlap` and `sinks`.

    Attributes:
        choice: its slots; None without any.
    """

    choice: Slots | None

    def set_slots(self, counts: tuple[int, ...]) -> None:
        """Give each kv head so many slots from the next text on; `state_bytes` follows."""
        assert self.choice is not None  # who asks has looked for it
        self.settings = replace(self.settings, slots=counts)
        self.choice.counts = counts

    def score_net(self) -> nn.Module | None:
        """The net of learned scores, which the stage `scores` trains: `... d_model` -> `... KV` logits; None without
        one."""
        return None if self.choice is None else self.choice.net

    @torch.no_grad()
    def score_targets(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the scores of whole texts should rise with, `batch pos KV`; called as `forward` is, without a cache.

        See `far_attention`; computed from this module's queries and keys as they are.
        """
        q, k, _ = self.qkv(hidden_in(args, kwargs))
        q, k = self.rotate(q, k, kwargs.get("position_embeddings"))
        return far_attention(
            q,
            k,
            segment=self.settings.segment,
            overlap=self.settings.overlap,
            sinks=self.settings.sinks,
            scaling=self.scaling,
            softcap=self.softcap,
            window=self.window,
        )

    def restores(self) -> dict[str, AbstractContextManager[None]]:
        return {} if self.settings.sinks else {"first_token": self._with_sink()}

    @contextmanager
    def _with_sink(self) -> Iterator[None]:
        before = self.settings
        self._set(replace(before, sinks=1))
        try:
            yield
        finally:
            self._set(before)

    def _set(self, settings: Any) -> None:
        self.settings = settings
        if self.choice is not None:
            self.choice.sinks = settings.sinks
