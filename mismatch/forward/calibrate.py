"""Calibration: the teacher's inputs and outputs for mechanisms that are set from them (mean ablation, DyT's alpha).

One pass of the teacher over calibration text, stopped behind the last calibrated layer. Calibration text
never overlaps the evaluation text (`mismatch.texts.documents.assert_disjoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from mismatch.forward import hooks
from mismatch.forward.sites import Tap, massive, taps, tensor_of
from mismatch.models.layout import HEADS, Layout


class Calibrated(Protocol):
    """A calibrator, as the mechanisms declare it (this room and theirs do not import each other)."""

    def update(self, inputs: Tensor, outputs: Tensor, keep: Tensor) -> None:
        """`batch pos d_model` twice, and bool `batch pos`: tokens that are neither at position 0 nor massive."""
        ...


def calibrate(
    layout: Layout,
    wanted: Mapping[tuple[int | None, str, Any], Calibrated],
    batches: Iterable[Tensor],
) -> None:
    """Fill every calibrator from the teacher's run over `batches` of ids (int64 `batch pos`)."""
    last = layout.n_layers - 1
    layers = {last if layer is None else layer for layer, _, _ in wanted}
    stop = None if any(layer is None for layer, _, _ in wanted) else max(layers) + 1
    streams = [taps(layout, layer)[0] for layer in sorted(layers)]
    bulk: dict[int, Tensor] = {}

    def note(tap: Tap, value: Tensor) -> None:
        keep = ~massive(value, torch.ones(value.shape[:2], dtype=torch.bool, device=value.device))
        keep[:, 0] = False
        bulk[tap.layer] = keep

    with ExitStack() as stack, torch.no_grad():
        for (layer, slot, _), calibrator in wanted.items():
            at = last if layer is None else layer

            def update(
                _module: Any,
                args: Any,
                kwargs: Any,
                out: Any,
                mine: Calibrated = calibrator,
                at: int = at,
            ) -> None:
                given = args[0] if args else kwargs["hidden_states"]
                mine.update(given, tensor_of(out), bulk[at].to(given.device))

            if slot == HEADS:
                _watch_heads(layout, layer, update, stack)
                continue
            module = layout.model.get_submodule(layout.slot_path(layer, slot))
            stack.callback(module.register_forward_hook(update, with_kwargs=True).remove)
        for ids in batches:
            hooks.run(layout, ids, streams, note, stop=stop)


def _watch_heads(
    layout: Layout, layer: int | None, update: Callable[..., None], stack: ExitStack
) -> None:
    """Call `update` with what enters an attention, and with its heads: what enters its output projection."""
    call: list[tuple[Any, Any]] = []

    def enter(_module: Any, args: Any, kwargs: Any) -> None:
        call[:] = [(args, kwargs)]

    def leave(module: Any, args: Any) -> None:
        update(module, *call.pop(), args[0])

    attention, output = (
        layout.model.get_submodule(layout.slot_path(layer, slot)) for slot in ("attn", "o_proj")
    )
    stack.callback(attention.register_forward_pre_hook(enter, with_kwargs=True).remove)
    stack.callback(output.register_forward_pre_hook(leave).remove)
