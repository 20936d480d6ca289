"""The same run on nnsight 0.8, for researchers who use it. The only file that imports nnsight.

Pitfalls that shaped it (measured): a wrapper built before surgery silently reads the OLD module, so a fresh one is
built for every run; it leaves a `forward` of its own on every module, so that is taken off after each; values must be
read in forward order; the `with` body must stand on its own lines in a file on disk; importing nnsight patches
`Tensor.backward`, so it is imported late, and only on request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from nnsight import NNsight, TransformersModel
from torch import Tensor, nn

from mismatch.forward.hooks import Visit, ignore
from mismatch.forward.sites import Tap, tensor_of
from mismatch.models.layout import Layout


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
    """As `mismatch.forward.hooks.run`, bit for bit."""
    with _taken_off(layout.decoder):
        return _run(layout, ids, taps, visit, start, stop, stream)


@contextmanager
def _taken_off(decoder: nn.Module) -> Iterator[None]:
    """Leave the modules with what they have now of what nnsight sets on them."""
    before = [(vars(module), dict(vars(module))) for module in decoder.modules()]
    try:
        yield
    finally:
        for now, then in before:
            for name in ("forward", "__nnsight__"):
                now.pop(name, None)
                if name in then:
                    now[name] = then[name]


def _run(
    layout: Layout,
    ids: Tensor,
    taps: Sequence[Tap],
    visit: Visit,
    start: int,
    stop: int | None,
    stream: Tensor | None,
) -> Tensor:
    wrapped = NNsight(layout.decoder)
    blocks = getattr(wrapped, layout.family.blocks)
    last = layout.n_layers if stop is None else stop
    wanted: dict[int, list[Tap]] = {}
    for tap in taps:
        wanted.setdefault(tap.layer, []).append(tap)
    with torch.no_grad(), wrapped.trace(input_ids=ids, use_cache=False):
        for layer in range(start):
            blocks[layer].skip(stream)
        if start == 0 and stream is not None:
            blocks[0].input = stream
        flowing = stream
        for layer in range(start, last):
            for tap in wanted.get(layer, ()):
                module = attrgetter(tap.path)(blocks[layer]) if tap.path else blocks[layer]
                visit(tap, module.input if tap.side == "in" else tensor_of(module.output))
            flowing = blocks[layer].output
        for layer in range(last, layout.n_layers):
            blocks[layer].skip(flowing)
        final = wrapped.output.last_hidden_state.save()
    return final


def open_model(model: Any, tokenizer: Any) -> Any:
    """The (swapped) model as a ready nnsight model. Trace it as usual: `with nn.trace("text"): ...`."""
    return TransformersModel(model, tokenizer=tokenizer, task="text-generation")
