"""A trace of a tiny model without tokenizer or text: random windows straight through the loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mismatch import registry, spec
from mismatch.metrics.sums.per_document import Units
from mismatch.models.layout import Layout
from mismatch.runs.site_names import SITES
from mismatch.runs.table import as_table
from mismatch.stages.trace.batches import measure
from mismatch.stages.trace.meters import Collector
from mismatch.surgery import operate as surgery
from mismatch.surgery.controls import control_specs
from mismatch.surgery.operate import Student, placed
from mismatch.texts.windows import Source, Windows

SEQ_LEN, N_DOCS = 24, 4


def cut(n: int = 6, seq_len: int = SEQ_LEN, vocab: int = 101, seed: int = 0) -> Windows:
    """`n` windows of random tokens, of four documents in turn."""
    ids = np.random.default_rng(seed).integers(3, vocab, (n, seq_len))
    docs = np.arange(n) % N_DOCS
    return Windows(
        ids=ids,
        doc=docs,
        offset=np.arange(n) // N_DOCS * seq_len,
        scored=np.ones(ids.shape, bool),
        names=tuple(f"doc {i}" for i in range(min(n, N_DOCS))),
        asked=ids.size,
        prefix=(),
        source=Source(documents=min(n, N_DOCS)),
    )


def student_of(
    model: nn.Module, swap: str | spec.Spec, name: str = "swap", seed: int = 0
) -> Student:
    layout = Layout.of(model)
    parsed = spec.parse(swap) if isinstance(swap, str) else swap
    text = spec.format(parsed)
    return surgery.operate(layout, placed(parsed, layout), spec=text, name=name, seed=seed)


def students_of(model: nn.Module, swap: str, controls: tuple[str, ...] = ()) -> list[Student]:
    first = student_of(model, swap)
    more = control_specs(controls, first.plan)
    return [first, *(student_of(model, text, name) for name, text in more.items())]


def collector_of(
    model: nn.Module,
    students: list[Student],
    windows: Windows,
    metrics: Any = None,
    sample: float = 1.0,
    sites: Sequence[str] = SITES,
) -> Collector:
    return Collector(
        Layout.of(model),
        {s.name: s.layout for s in students},
        {s.name: s.plan for s in students},
        metrics or tuple(registry.metrics().names()),
        units=Units.by(windows.doc, windows.offset),
        n_pos=windows.seq_len,
        n_tokens=int(windows.scored.sum()),
        sample=sample,
        sites=sites,
    )


def measured(
    model: nn.Module,
    swap: str,
    controls: tuple[str, ...] = (),
    *,
    windows: Windows | None = None,
    metrics: Any = None,
    batch_size: int = 2,
    sample: float = 1.0,
    sites: Sequence[str] = SITES,
    **options: Any,
) -> tuple[Any, list[Student]]:
    """The table of a trace, and its students."""
    windows = windows or cut()
    students = students_of(model, swap, controls)
    collector = collector_of(model, students, windows, metrics, sample, sites)
    measure(Layout.of(model), students, collector, windows, batch_size=batch_size, **options)
    return as_table([row | {"run_id": "test"} for row in collector.rows()]), students


def tokens(windows: Windows) -> torch.Tensor:
    return torch.from_numpy(windows.ids)
