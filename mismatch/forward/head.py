"""The head: final states to predictions, a chunk of tokens at a time. Whole logits are never kept.

compare    students beside the teacher, whose chunk is made once for all of them
scores     log-probabilities of the next tokens of the text
mean_kl    KL to the teacher with a gradient, for distillation
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mismatch.metrics.sums.logits import LogitPair, kl_per_token
from mismatch.models.layout import Layout

CHUNK = 128
"""Tokens that go through the head at once, at most."""
LOGITS = 2**24
"""Logits that are made at once, of one model: 64 MB. A vocabulary of 262k words gets 64 tokens."""
ROWS = 16
"""Tokens whose logits fit into a processor's cache."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Predictions:
    """Facts about some predictions of the next token, int64 `tokens` each.

    Attributes:
        targets: the token that follows; -1 at the end of a window.
        docs: its document.
        positions: of the token that the prediction is made at.
    """

    targets: Tensor
    docs: Tensor
    positions: Tensor

    @classmethod
    def of(cls, ids: Tensor, docs: Tensor, at: Tensor | None = None) -> Predictions:
        """The predictions of windows.

        Args:
            ids: int64 `batch pos`.
            docs: int64 `batch`.
            at: int64, which of the flattened tokens; None: all.
        """
        targets = torch.full_like(ids, -1)
        targets[:, :-1] = ids[:, 1:]
        positions = torch.arange(ids.shape[1], device=ids.device)
        docs = docs.to(ids.device)[:, None]
        whole = cls(*(fact.expand_as(ids).flatten() for fact in (targets, docs, positions)))
        return whole if at is None else whole[at.to(ids.device)]

    def __getitem__(self, part: slice | Tensor) -> Predictions:
        return Predictions(self.targets[part], self.docs[part], self.positions[part])

    def to(self, device: torch.device) -> Predictions:
        """The same on a device."""
        return Predictions(*(fact.to(device) for fact in astuple(self)))


def chunk_of(layout: Layout) -> int:
    """Tokens that go through this model's head at once."""
    return max(ROWS, min(CHUNK, LOGITS // layout.vocab))


def log_probs(layout: Layout, final: Tensor) -> Tensor:
    """Float32 log-probabilities, `... vocab`, of final states, `... d_model`."""
    logits = layout.head(final).float()
    if logits.device.type != "cpu":
        return logits.log_softmax(-1)
    # In place, a few rows at a time, so that they stay in the cache: a third of the time at a vocabulary of 49k.
    for rows in logits.split(ROWS):
        rows.copy_(rows.log_softmax(-1))
    return logits


def compare(
    teacher: Layout,
    reference: Tensor,
    students: Iterable[tuple[Key, Layout, Tensor]],
    predictions: Predictions,
    *,
    chunk: int | None = None,
) -> Iterator[tuple[Key, LogitPair]]:
    """Every student beside the teacher, chunk after chunk.

    Args:
        teacher: layout, for its head.
        reference: its final states, `tokens d_model`.
        students: name, layout and final states, `tokens d_model` each.
        predictions: of the same tokens.
        chunk: tokens that go through a head at once; None: as `chunk_of` the teacher.

    Yields:
        The name of a student and its pair with the teacher. Pairs of one chunk share what is the teacher's alone.
    """
    students = list(students)
    if not students:
        return
    chunk = chunk or chunk_of(teacher)
    for start in range(0, len(reference), chunk):
        part = slice(start, start + chunk)
        theirs = log_probs(teacher, reference[part])
        facts = astuple(predictions[part].to(theirs.device))
        pair: LogitPair | None = None
        for name, layout, states in students:
            ours = log_probs(layout, states[part]).to(theirs.device)
            pair = LogitPair(theirs, ours, *facts) if pair is None else pair.with_student(ours)
            yield name, pair


def scores(layout: Layout, final: Tensor, ids: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each scored token, and whether it is the likeliest.

    Only their logits are made: of a prompt of 1000 tokens five may be scored, and the head of a small model is half of
    its work.

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
    chunk = chunk_of(layout)
    for part, target in zip(states.split(chunk), targets.split(chunk), strict=True):
        logp = log_probs(layout, part)
        target = target.to(logp.device)
        found.append(logp.gather(1, target[:, None])[:, 0].double().cpu())
        hit.append((logp.argmax(-1) == target).cpu())
    row, at = row.cpu(), at.cpu()
    value = torch.zeros(ids.shape, dtype=torch.float64)
    right = torch.ones(ids.shape, dtype=torch.bool)
    value[row, at], right[row, at] = torch.cat(found), torch.cat(hit)
    return value, right


def mean_kl(teacher: Layout, reference: Tensor, student: Layout, states: Tensor) -> Tensor:
    """KL(teacher || student), mean over tokens, a scalar with a gradient to the student's final states.

    Args:
        teacher, student: layouts; both heads are frozen.
        reference, states: final states, `tokens d_model`.
    """
    return _HeadKL.apply(states, reference, student, teacher)


class _HeadKL(torch.autograd.Function):
    """The gradient of each chunk goes back to the final states at once: d KL / d logits = (q - p) / tokens."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, reference: Tensor, student: Layout, teacher: Layout
    ) -> Tensor:
        total = torch.zeros((), device=states.device, dtype=torch.float64)
        gradient = torch.empty_like(states) if states.requires_grad else None
        chunk = chunk_of(teacher)
        for start in range(0, len(states), chunk):
            at = slice(start, start + chunk)
            with torch.no_grad():
                p = log_probs(teacher, reference[at].to(states.dtype))
            with torch.enable_grad():
                own = states[at].detach().requires_grad_(gradient is not None)
                logits = student.head(own)
            with torch.no_grad():
                # Not in place as in `log_probs`: autograd may still need these logits.
                q = logits.detach().float().log_softmax(-1)
                total += kl_per_token(p, q).double().sum()
            if gradient is not None:
                back = (q.exp_().sub_(p.exp_())).to(logits.dtype)
                (gradient[at],) = torch.autograd.grad(logits, own, back)
        ctx.save_for_backward(gradient)
        ctx.tokens = len(states)
        return (total / len(states)).float()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream / ctx.tokens).to(gradient.dtype), None, None, None
