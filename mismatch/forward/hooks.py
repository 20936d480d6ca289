"""The default backend: plain PyTorch hooks. It sees the module that is live, whatever was swapped.

One function runs (a part of) a decoder: blocks before `start` are skipped by handing the stored stream to block
`start`, blocks from `stop` on are skipped too. Rotary embeddings and masks are made by transformers itself, so there is
no code per family, and the values are bit-equal to those of the whole forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mismatch.forward.sites import Tap, tensor_of
from mismatch.models.layout import Layout

Visit = Callable[[Tap, Tensor], None]


def on_device(layout: Layout, array: np.ndarray) -> Tensor:
    """Token ids, or what goes with them, where the model's embedding is."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(layout.embedding_device)


def ignore(_tap: Tap, _value: Tensor) -> None:
    """For a run of which only the final states are wanted."""


def run(
    layout: Layout,
    ids: Tensor,
    taps: Sequence[Tap] = (),
    visit: Visit = ignore,
    *,
    start: int = 0,
    stop: int | None = None,
    stream: Tensor | None = None,
) -> Tensor:
    """Run the decoder on `ids` and hand each tapped value to `visit`, in computation order.

    Args:
        layout: of the model to run.
        ids: int64 `batch pos`.
        taps: what to capture; only of blocks in `[start, stop)`.
        visit: called with the tap and the value, `batch pos d_model`. The value is not a copy.
        start: the first block that runs.
        stop: the first block that does not run any more; None runs to the end.
        stream: `batch pos d_model`, the stream entering block `start`; needed when `start > 0`.

    Returns:
        The final-norm states, `batch pos d_model` (of the last stream that there is, when `stop` is given).
    """
    with ExitStack() as stack:
        stack.enter_context(skipping(layout, start, stop, stream))
        stack.enter_context(tapping(layout, taps, visit))
        return layout.decoder(input_ids=ids, use_cache=False).last_hidden_state


@contextmanager
def tapping(layout: Layout, taps: Sequence[Tap], visit: Visit) -> Iterator[None]:
    """Hooks on the modules of `taps` for as long as the context lives."""
    with ExitStack() as stack:
        for tap in taps:
            stack.callback(_hook(tap, tap.module(layout), visit).remove)
        yield


def _hook(tap: Tap, module: nn.Module, visit: Visit) -> RemovableHandle:
    if tap.side == "out":
        return module.register_forward_hook(lambda _m, _a, out: visit(tap, tensor_of(out)))

    def take(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        visit(tap, args[0] if args else kwargs["hidden_states"])

    return module.register_forward_pre_hook(take, with_kwargs=True)


@contextmanager
def skipping(layout: Layout, start: int, stop: int | None, stream: Tensor | None) -> Iterator[None]:
    """Blocks outside `[start, stop)` pass on what they are given; block `start - 1` gives the stored `stream`.

    The skipped modules stay in place (a model may read attributes of them); only their `forward` is shadowed.
    """
    blocks = layout.blocks
    passed = [*range(start), *range(len(blocks) if stop is None else stop, len(blocks))]
    with ExitStack() as stack:
        for layer in passed:
            given = stream if layer == start - 1 else None
            stack.enter_context(_shadowed(blocks[layer], given))
        yield


@contextmanager
def _shadowed(block: nn.Module, given: Tensor | None) -> Iterator[None]:
    own = block.__dict__.get("forward")  # accelerate and nnsight put theirs here

    def forward(hidden_states: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return hidden_states if given is None else given

    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own
