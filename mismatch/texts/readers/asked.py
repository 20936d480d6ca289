"""What every reader is told, and how much it may read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LIMIT = 2**28
"""Bytes of one document, and of all documents of one source: some 60 million tokens. What is behind is not read."""
HUB_LIMIT = 2**25
"""The same of a data set of the hub, whose rows come over the network each time: some 8 million tokens."""


@dataclass(frozen=True)
class Asked:
    """How rows and token ids are understood.

    Attributes:
        field: the column or key that holds the text; None: the first of `rows.FIELDS` that is there.
        tokenizer: of the model: tells where documents end in a stream of token ids, and how wide these are.
    """

    field: str | None = None
    tokenizer: Any = None
