"""Run every subject on the same ids: blocks in front of a swap once, the head only where something is scored.

A prompt of 1000 tokens is asked for five of them, and the head of a small model is half of its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mismatch.errors import NumericsError, RunError
from mismatch.forward import hooks
from mismatch.forward.sites import Tap, taps
from mismatch.models.layout import Layout
from mismatch.probes.base import Subject

CHUNK = 256
"""Tokens that go through the head at once."""


def finals(
    subjects: Sequence[Subject],
    ids: Tensor,
    sites: Callable[[Subject], Sequence[Tap]] = lambda subject: (),
    visit: Callable[[Subject, Tap, Tensor], None] = lambda subject, tap, value: None,
) -> Iterator[tuple[Subject, Tensor]]:
    """Every subject's final states on one batch, the teacher's first.

    A student runs from its first swapped block on, from the teacher's own stream: bit-equal to a whole run
    (`mismatch.forward.verify` proves it of each model and student).

    Args:
        subjects: the teacher first.
        ids: int64 `batch pos`.
        sites: what else to look at in a subject, from its first swapped block on.
        visit: told of each value there, `batch pos d_model`, as it is computed.

    Yields:
        subject, and `batch pos d_model`.

    Raises:
        NumericsError: a final state is NaN or infinite.
        RunError: a model changed a stored stream in place.
    """
    teacher, *students = subjects
    kept: dict[int, Tensor] = {}

    starts = {student.start for student in students} - {0}
    ends = {taps(teacher.layout, start - 1)[-1] for start in starts}
    looked = set(sites(teacher))

    def keep(tap: Tap, value: Tensor) -> None:
        if tap in ends:
            kept[tap.layer + 1] = value
        if tap in looked:
            visit(teacher, tap, value)

    yield teacher, _finite(teacher, hooks.run(teacher.layout, ids, [*(ends | looked)], keep))
    versions = {start: stream._version for start, stream in kept.items()}
    for student in students:
        start = student.start
        stream = kept.get(start)
        if stream is not None and stream._version != versions[start]:
            raise RunError(f"the stream entering layer {start} was changed in place")
        tell = partial(visit, student)
        final = hooks.run(student.layout, ids, sites(student), tell, start=start, stream=stream)
        yield student, _finite(student, final)


def log_probs(layout: Layout, final: Tensor) -> Tensor:
    """Final states `tokens d_model` -> log-probabilities of the next token, float32 `tokens vocab`."""
    return layout.head(final).float().log_softmax(-1)


def scores(layout: Layout, final: Tensor, ids: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each scored token, and whether it is the likeliest.

    Args:
        layout: of the model.
        final: `batch pos d_model`.
        ids: int64 `batch pos`.
        scored: bool `batch pos`, nowhere at position 0.

    Returns:
        float64 `batch pos` (0 where not scored) and bool `batch pos` (True where not scored), on the CPU.
    """
    row, at = scored.nonzero(as_tuple=True)
    targets = ids[row, at].to(final.device)
    states = final[row.to(final.device), (at - 1).to(final.device)]
    found, hit = [], []
    for part, target in zip(states.split(CHUNK), targets.split(CHUNK), strict=True):
        logits = log_probs(layout, part)
        target = target.to(logits.device)
        found.append(logits.gather(1, target[:, None])[:, 0].double().cpu())
        hit.append((logits.argmax(-1) == target).cpu())
    row, at = row.cpu(), at.cpu()
    value = torch.zeros(ids.shape, dtype=torch.float64)
    right = torch.ones(ids.shape, dtype=torch.bool)
    value[row, at], right[row, at] = torch.cat(found), torch.cat(hit)
    return value, right


def on(layout: Layout, ids: np.ndarray) -> Tensor:
    """Ids where the model's embedding is."""
    return torch.from_numpy(np.ascontiguousarray(ids)).to(layout.embedding_device)


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities `... vocab`: every term >= 0 (see `mismatch.metrics.kl`)."""
    p, d = teacher.exp(), student.to(teacher.device) - teacher
    # A token that the teacher rules out has p = 0, and its d may be inf - inf.
    return torch.where(p > 0, p * (torch.expm1(d) - d), 0.0).sum(-1, dtype=torch.float64)


def _finite(subject: Subject, final: Tensor) -> Tensor:
    if not torch.isfinite(final).all():
        raise NumericsError(
            f"NaN or infinity in the {subject.name}'s final states",
            hint="a swapped layer that overflows? try --dtype float32",
        )
    return final
