"""A model in float32 that holds no more than one block of its weights in float32."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor, nn

from mismatch.models.layout import Layout
from mismatch.models.private import private_copy


def in_float32(layout: Layout) -> Layout:
    """The same model in float32, its own tree: the logits are those of `model.float()` to the bit.

    Embedding, norms and head are float32 from now on; a block is while it runs, and then has the memory of the first
    model again.

    Args:
        layout: of a model in a smaller dtype, nothing of it offloaded or in codes.
    """
    made = replace(layout, model=private_copy(layout.model))
    blocks = {id(tensor) for tensor in _tensors(made.blocks)}
    _widen([tensor for tensor in _tensors(made.model) if id(tensor) not in blocks])
    for block in made.blocks:
        _wide_while_it_runs(block)
    return made


def _wide_while_it_runs(block: nn.Module) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def before(_block: nn.Module, _args: Any) -> None:
        kept.extend(_widen(_tensors(block)))

    def behind(_block: nn.Module, _args: Any, _out: Any) -> None:
        for tensor, narrow in kept:
            tensor.data = narrow
        kept.clear()

    block.register_forward_pre_hook(before)
    block.register_forward_hook(behind, always_call=True)


def _tensors(tree: nn.Module) -> list[Tensor]:
    return [t for t in chain(tree.parameters(), tree.buffers()) if t.is_floating_point()]


def _widen(tensors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Make tensors float32; with what they were."""
    before = [(tensor, tensor.data) for tensor in tensors]
    for tensor, narrow in before:
        tensor.data = narrow.float()
    return before
