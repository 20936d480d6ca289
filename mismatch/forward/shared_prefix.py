"""The teacher runs once, each student from its first swapped block on: how every stage runs its models.

```
teacher   block 0 .. block k-1 | block k .. block L-1  final         all of it, once
student                          block k .. block L-1  final         from the teacher's stream entering k
```
Blocks before the first swapped one are the same modules over the same tensors, so running them again could only
repeat the teacher: handing the stored stream to block k is bit-exact (proved on every model by
`mismatch.forward.verify`).

    run_prefix    a run that keeps the streams entering some blocks
    run_suffix    a run that begins from one of them
    finals        both, for several models on one batch: their final states
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mismatch.errors import NumericsError, RunError
from mismatch.forward import hooks
from mismatch.forward.sites import Tap, leaving
from mismatch.models.layout import Layout

Key = TypeVar("Key", bound=Hashable)


class Stored(dict[Key, Tensor]):
    """Values of one run that other runs read. A module that changed one in place would falsify what is read later."""

    def __init__(self) -> None:
        super().__init__()
        self._versions: dict[Key, int] = {}

    def keep(self, key: Key, value: Tensor) -> None:
        """Store a value, not a copy."""
        self[key] = value
        self._versions[key] = value._version

    def check(self, key: Key, message: str) -> None:
        """Refuse a value that was changed since it was kept.

        Raises:
            RunError: with this message.
        """
        if key in self and self[key]._version != self._versions[key]:
            raise RunError(message)


def is_finite(value: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    # One sum is a single read of the tensor; the exact test runs only when it fails.
    return bool(torch.isfinite(value.sum(dtype=torch.float32)) or torch.isfinite(value).all())


def check_finite(value: Tensor, who: str, where: str) -> None:
    """Refuse numbers that are NaN or infinite.

    Raises:
        NumericsError: names the model and the site.
    """
    if is_finite(value):
        return
    kind = "NaN" if torch.isnan(value).any() else "infinity"
    raise NumericsError(
        f"{kind} in the {who}'s activations: {where}",
        hint="a swapped layer that overflows? try --dtype float32, or look at the mechanism's own state"
        if who != "teacher"
        else "the teacher itself is not finite here: try --dtype float32",
    )


def run_prefix(
    layout: Layout,
    ids: Tensor,
    starts: Collection[int],
    *,
    begin: int = 0,
    streams: Stored[int] | None = None,
    sites: Sequence[Tap] = (),
    visit: hooks.Visit = hooks.ignore,
) -> tuple[Tensor, Stored[int]]:
    """Run a model and keep the streams that others begin from.

    Args:
        layout: of the model.
        ids: int64 `batch pos`.
        starts: blocks; 0 needs no stream.
        begin: the first block that runs, from the stream kept in `streams`.
        streams: kept so far; those of `starts` are added.
        sites: what else to capture.
        visit: called with each value there.

    Returns:
        The final states, `batch pos d_model`; the streams by the block that they enter.
    """
    streams = Stored() if streams is None else streams
    ends = {leaving(start - 1): start for start in starts if start > 0}
    captured = set(sites)

    def take(tap: Tap, value: Tensor) -> None:
        if tap in ends:
            streams.keep(ends[tap], value)
        if tap in captured:
            visit(tap, value)

    wanted = list(dict.fromkeys([*ends, *sites]))
    final = hooks.run(layout, ids, wanted, take, start=begin, stream=streams.get(begin))
    return final, streams


def run_suffix(
    layout: Layout,
    ids: Tensor,
    start: int,
    streams: Stored[int],
    who: str,
    *,
    sites: Sequence[Tap] = (),
    visit: hooks.Visit = hooks.ignore,
) -> Tensor:
    """Run a model from block `start` on, from the stream that another run kept: its final states, `batch pos d_model`.

    Raises:
        RunError: it changed that stream in place; `who` names it.
    """
    final = hooks.run(layout, ids, sites, visit, start=start, stream=streams.get(start))
    streams.check(start, f"{who} changed the stream that it was given in place")
    return final


class Runnable(Protocol):
    """A model that runs beside others."""

    @property
    def name(self) -> str: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def start(self) -> int:
        """The first block that is not the teacher's own."""


Model = TypeVar("Model", bound=Runnable)


def finals(
    subjects: Sequence[Model],
    ids: Tensor,
    sites: Callable[[Model], Sequence[Tap]] = lambda subject: (),
    visit: Callable[[Model, Tap, Tensor], None] = lambda subject, tap, value: None,
) -> Iterator[tuple[Model, Tensor]]:
    """Every subject's final states on one batch, the teacher's first. A subject runs when the loop takes it.

    Args:
        subjects: the teacher first.
        ids: int64 `batch pos`.
        sites: what else to capture in a subject, from its first swapped block on.
        visit: called with each value there, `batch pos d_model`, as it is computed.

    Yields:
        subject, and `batch pos d_model`.

    Raises:
        NumericsError: a final state is NaN or infinite.
        RunError: a model changed a stored stream in place.
    """
    teacher, *students = subjects
    starts = {student.start for student in students}
    of_teacher = partial(visit, teacher)
    final, streams = run_prefix(teacher.layout, ids, starts, sites=sites(teacher), visit=of_teacher)
    check_finite(final, teacher.name, "final states")
    yield teacher, final
    for student in students:
        final = run_suffix(
            student.layout,
            ids,
            student.start,
            streams,
            f"the {student.name}",
            sites=sites(student),
            visit=partial(visit, student),
        )
        check_finite(final, student.name, "final states")
        yield student, final
