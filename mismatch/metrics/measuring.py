"""`measure`: one metric on two arrays, for notebooks and tests. A trace does not use it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mismatch.errors import UsageError
from mismatch.metrics import load_metric
from mismatch.metrics.base import GROUP, LogitPair, Pair, PairMoments, Reading, massive_tokens
from mismatch.metrics.sums.meter import StudentMeter, TeacherMeter
from mismatch.metrics.sums.pairs import wide
from mismatch.metrics.sums.per_document import Units


def measure(
    name: str,
    teacher: Any,
    student: Any,
    *,
    docs: Any = None,
    valid: Any = None,
    before: tuple[Any, Any] | None = None,
    targets: Any = None,
    group: int = GROUP,
) -> list[Reading]:
    """Compute metric `name` once.

    Args:
        teacher, student: arrays or tensors, `n d` (each row a document of its own, all rows used)
            or `batch pos d` (each row of the batch a document; second-moment metrics then leave
            out position 0 and massive tokens). For cka_minibatch the rows of `n d` are one
            window. For metrics at logits or lens: logits or log-probabilities, with the vocabulary last.
        docs: int `n` or `batch`: number of each row's document, from 0.
        valid: bool `n` or `batch pos`: tokens to use.
        before: for update_size: the stream before the update, teacher's and student's.
        targets: for nll: next token, int `n` or `batch pos`, -1 where there is none.
        group: tokens per group of cka_minibatch.

    Raises:
        UsageError: unknown metric, shapes that do not fit.
    """
    metric = load_metric(name)
    teacher, student = _cube(teacher), _cube(student)
    same = teacher.shape[:2] == student.shape[:2] and (
        name == "cka" or teacher.shape[2] == student.shape[2]
    )
    if not same:
        raise UsageError(
            f"{name}: teacher is {tuple(teacher.shape)}, student is {tuple(student.shape)}",
            hint="both must hold the same tokens (batch, pos) and the same channels.",
        )
    batch, pos, d = teacher.shape
    flat = pos == 1
    valid = torch.ones(batch, pos, dtype=torch.bool) if valid is None else _plain(valid)
    valid = valid.bool().reshape(batch, pos)
    docs = torch.arange(batch) if docs is None else _plain(docs).long()
    units = Units.by(docs.cpu().numpy())
    docs = torch.from_numpy(units.of).to(docs.device)
    out = StudentMeter(
        [name], d, n_docs=units.count, n_pos=max(pos, 1), units=units.over, group=group
    )
    if metric.at in ("logits", "lens"):
        out.update(_logit_pair(teacher, student, docs, valid, targets))
        return [reading for _, reading in out.read()]
    bulk = valid.clone()
    if not flat:
        bulk[:, 0] = False
        bulk &= ~massive_tokens(teacher)
    if before is not None:
        before = (_cube(before[0]), _cube(before[1]))
    if metric.state == "minibatch" and flat:  # groups are tokens of one window
        teacher, student, valid, docs = (
            teacher.transpose(0, 1),
            student.transpose(0, 1),
            valid.T,
            docs[:1],
        )
        bulk = valid
    pair = Pair(teacher, student, docs, valid, bulk, bulk, before)
    meter = TeacherMeter([name], d, group=group)
    if name == "cka" and student.shape[2] != d:
        out.parts["moments"] = PairMoments(d, student.shape[2])
    meter.update(pair)
    out.update(pair)
    return [reading for _, reading in out.read(meter)]


def _plain(x: Any) -> Tensor:
    return x.detach() if torch.is_tensor(x) else torch.as_tensor(x)


def _cube(x: Any) -> Tensor:
    x = _plain(x)
    if x.dim() not in (2, 3):
        raise UsageError(
            f"an array with {x.dim()} axes cannot be measured", hint="n d, or batch pos d."
        )
    return x[:, None] if x.dim() == 2 else x


def _logit_pair(
    teacher: Tensor, student: Tensor, docs: Tensor, valid: Tensor, targets: Any
) -> LogitPair:
    batch, pos, _ = teacher.shape
    keep = valid.flatten()
    none = torch.full((batch * pos,), -1)
    next_token = none if targets is None else _plain(targets).long().flatten()
    return LogitPair(
        wide(teacher).flatten(0, 1)[keep].log_softmax(-1),
        wide(student).flatten(0, 1)[keep].log_softmax(-1),
        next_token[keep],
        docs[:, None].expand(batch, pos).flatten()[keep],
        torch.arange(pos).expand(batch, pos).flatten()[keep],
    )
