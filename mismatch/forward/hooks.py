"""The default backend: plain PyTorch hooks on the modules in place, whatever was swapped.

One function runs a decoder or some of its blocks: blocks before `start` are skipped by passing the stored stream to
block `start`, blocks from `stop` on are skipped too. transformers itself makes rotary embeddings and masks, so there is
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
    """Token ids, or numbers that go with them, on the device of the model's embedding."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(layout.embedding_device)


def ignore(_tap: Tap, _value: Tensor) -> None:
    """The `visit` of a run whose final states alone are used."""


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
    """Run the decoder on `ids` and pass each tapped value to `visit`, in computation order.

    Args:
        layout: of the model to run.
        ids: int64 `batch pos`.
        taps: what to capture; only of blocks in `[start, stop)`.
        visit: called with the tap and the value, `batch pos d_model`. The value is not a copy.
        start: the first block that runs.
        stop: the first block that no longer runs; None runs to the end.
        stream: `batch pos d_model`, the stream entering block `start`; needed when `start > 0`, and at block 0 in place
            of the model's own embedding.

    Returns:
        The final-norm states, `batch pos d_model` (of the stream leaving block `stop - 1`, when `stop` is given).
    """
    with ExitStack() as stack:
        stack.enter_context(skipping(layout, start, stop, stream))
        stack.enter_context(tapping(layout, taps, visit))
        return layout.decoder(input_ids=ids, use_cache=False).last_hidden_state


@contextmanager
def tapping(layout: Layout, taps: Sequence[Tap], visit: Visit) -> Iterator[None]:
    """Hooks on the modules of `taps` while the context lives."""
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
    """Blocks outside `[start, stop)` return their input; block `start` gets the stored `stream`.

    The skipped modules stay in place (a model may read attributes of them); only their `forward` is shadowed.
    """
    blocks = layout.blocks
    passed = [*range(start), *range(len(blocks) if stop is None else stop, len(blocks))]
    with ExitStack() as stack:
        for layer in passed:
            given = stream if layer == start - 1 else None
            stack.enter_context(_shadowed(blocks[layer], given))
        if start == 0 and stream is not None:
            given_stream = _giving(stream)
            hook = blocks[0].register_forward_pre_hook(given_stream, with_kwargs=True, prepend=True)
            stack.callback(hook.remove)
        yield


def _giving(stream: Tensor) -> Callable[..., tuple[tuple, dict]]:
    """A pre-hook that hands a block another stream."""

    def give(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return ((stream, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": stream})

    return give


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
