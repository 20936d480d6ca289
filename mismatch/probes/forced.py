"""Forced running: one block of a subject on a given stream, the teacher's own or a changed one.

The block runs inside its model, so transformers itself makes rotary embeddings, masks and padding.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mismatch.forward import hooks
from mismatch.forward.sites import Tap, taps
from mismatch.models.layout import Layout
from mismatch.probes.base import Subject


def entering(layout: Layout, ids: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """The stream entering each of these blocks in the teacher: `batch pos d_model` each.

    Args:
        layout: of the teacher.
        ids: int64 `batch pos`.
        layers: 0-based.
    """
    found: dict[int, Tensor] = {}

    def keep(tap: Tap, value: Tensor) -> None:
        found[tap.layer] = value

    wanted = [taps(layout, layer)[0] for layer in sorted(set(layers))]
    if wanted:
        hooks.run(layout, ids, wanted, keep, stop=max(layers) + 1)
    return found


def update(subject: Subject, layer: int, ids: Tensor, stream: Tensor) -> Tensor:
    """What the attention of one block adds to the stream; of a block that was replaced as a whole, all that it adds.

    Args:
        subject: the model of the block.
        layer: 0-based.
        ids: int64 `batch pos`; they only set shapes and masks.
        stream: `batch pos d_model`, entering the block.

    Returns:
        `batch pos d_model`.
    """
    found: dict[str, Tensor] = {}

    def keep(tap: Tap, value: Tensor) -> None:
        found[tap.site] = value

    whole = layer in subject.whole_blocks
    wanted = taps(subject.layout, layer, inner=not whole)
    site = "resid_post" if whole else "attn_out"
    hooks.run(
        subject.layout,
        ids,
        [tap for tap in wanted if tap.site == site],
        keep,
        start=layer,
        stop=layer + 1,
        stream=stream,
    )
    return found[site] - stream if whole else found[site]
