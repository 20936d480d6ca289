"""Run the text through teacher and students, batch by batch, and keep only sums.

The loop knows how to stop and go on: the state (all accumulators and the number of the next batch) is saved at batch
borders, so a run that was killed goes on from the last border and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mismatch.errors import NumericsError
from mismatch.forward import hooks
from mismatch.forward.hooks import on_device
from mismatch.forward.paired_sites import Runner, stream
from mismatch.models.layout import Layout
from mismatch.runs.kept_pages import kept_pages
from mismatch.runs.ranks import ALONE, Ranks
from mismatch.runs.state import State
from mismatch.runs.stopping import polite
from mismatch.runs.table import FLOOR
from mismatch.stages.trace.meters import Collector
from mismatch.surgery.operate import Student
from mismatch.texts.windows import Windows

FLOOR_TOKENS = 256  # of the first window that are run once more in another shape
SAVE_EVERY = 20.0  # seconds between two saves of the state: little to lose
CHEAP = 0.01 * SAVE_EVERY  # seconds of a save; one that takes longer is made less often


def measure(
    teacher: Layout,
    students: Sequence[Student],
    collector: Collector,
    windows: Windows,
    *,
    batch_size: int,
    reference: Layout | None = None,
    ranks: Ranks = ALONE,
    state: State | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda windows: None,
    run: Callable[..., torch.Tensor] = hooks.run,
) -> Collector:
    """Fill the collector from every window; on several ranks, each from its share.

    Args:
        teacher: layout of the untouched model.
        students: the swap and its controls.
        collector: what is in it is let go.
        windows: the text.
        batch_size: windows per forward pass.
        reference: the same model in float32 when the teacher is not: then the floor is what the format itself brings;
            None measures the teacher against itself in another batch shape.
        ranks: who we are among how many.
        state: where to save, and what to go on from; None saves nothing.
        fingerprint: of all that must be equal when a run goes on.
        progress: told how many windows were done since it was last told.
        run: the tracing backend.

    Returns:
        The collector, merged over all ranks on the first one.

    Raises:
        KeyboardInterrupt: after the batch in flight was finished and the state saved.
        NumericsError: NaN or infinity; names student, layer, site and the first batch.
        NoRoom: another rank is out of memory.
    """
    collector.clear()
    runners = [runner_of(student) for student in students]
    batches = list(enumerate(windows.batches(batch_size)))
    mine = [(i, batch) for i, batch in batches if ranks.mine(i)]
    first = _resume(collector, batch_size, state, fingerprint)
    progress(sum(len(batch.ids) for i, batch in mine if i < first))
    with polite() as stopping, kept_pages():
        saved, due_in = time.monotonic(), SAVE_EVERY
        for index, batch in mine:
            if index < first:
                continue
            ids = on_device(teacher, batch.ids)
            numbers = range(index * batch_size, index * batch_size + len(ids))
            # The floor rides on the first batch: its first window once more, alone and shorter.
            floor = index == 0 and reference is None
            others = [Runner(FLOOR, teacher, 0, crop=(1, FLOOR_TOKENS))] if floor else []
            scored = on_device(teacher, batch.scored)
            with _naming(index, numbers), collector.batch(ids, numbers, scored) as met:
                stream(teacher, [*runners, *others], ids, met, sites=collector.sites, run=run)
            if index == 0 and reference is not None:
                _format_floor(teacher, reference, collector, ids[:1], run)
            progress(len(ids))
            began = time.monotonic()
            if state is not None and (stopping() or began - saved > due_in):
                here = {"next": index + 1, "batch": batch_size}
                state.save(collector.state(), here, fingerprint or {})
                saved = time.monotonic()
                due_in = SAVE_EVERY * max(1.0, (saved - began) / CHEAP)
            if stopping():
                raise KeyboardInterrupt
        if state is not None and ranks.world > 1:
            # While this rank waits for the others, one of them may fail and end all.
            here = {"next": len(batches), "batch": batch_size}
            state.save(collector.state(), here, fingerprint or {})
    ranks.everywhere(None)  # one that is out of memory says so here
    parts = ranks.to_first(collector.state())
    for part in (parts or [])[1:]:
        collector.merge(collector.fresh().load(part))
    return collector


def runner_of(student: Student) -> Runner:
    """What the stream needs to know of a student."""
    return Runner(
        student.name,
        student.layout,
        student.plan.first,
        student.plan.alone,
        student.whole_blocks(),
        front=student.plan.front,
    )


def _format_floor(
    teacher: Layout,
    reference: Layout,
    collector: Collector,
    ids: torch.Tensor,
    run: Callable[..., torch.Tensor],
) -> None:
    """What the dtype alone brings: the float32 model as the teacher, the run's teacher as the student."""
    with collector.batch(ids, range(len(ids)), teacher=reference) as met:
        floor = Runner(FLOOR, teacher, 0)
        stream(reference, [floor], ids, met, sites=collector.sites, run=run)


def _resume(
    collector: Collector,
    batch_size: int,
    state: State | None,
    fingerprint: Mapping[str, Any] | None,
) -> int:
    """Fill the collector from the last save; the number of the batch to go on with. A save of larger batches, which
    did not fit, counts for nothing."""
    found = None if state is None else state.load(fingerprint or {})
    if found is None or found[1].get("batch") != batch_size:
        return 0
    arrays, info = found
    collector.load(arrays)
    return info["next"]


@contextmanager
def _naming(index: int, numbers: range) -> Iterator[None]:
    """Say in which batch a number first was not finite."""
    try:
        yield
    except NumericsError as error:
        where = f"first in batch {index}, windows {numbers[0]}-{numbers[-1]}"
        raise NumericsError(f"{error.message} ({where})", hint=error.hint) from error
