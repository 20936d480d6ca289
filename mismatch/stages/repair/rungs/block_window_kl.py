"""Rungs 3 and 4: what the blocks behind make of the repaired layer.

Both run the student from the first swapped block on, on the teacher's stream entering it, with gradients; the blocks in
front are the teacher's own and never run twice.

    short window   the student's stream after `width` more blocks is matched to the teacher's: the relative error of
                   what was ADDED since the swap, so that the part that is the same in both does not hide it
    end to end     KL(teacher || student) of the logits, in nats per token. No cross-entropy: it pulls the student to
                   the training text instead of to the teacher (Puzzle, arXiv 2411.19146, section 4)

Logits are made and forgotten chunk by chunk; the gradient of each chunk goes back to the final states at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mismatch.forward import hooks
from mismatch.forward.sites import taps
from mismatch.metrics.sums.logits import LogitPair
from mismatch.models.layout import Layout
from mismatch.stages.repair.rungs.activation_store import Store
from mismatch.stages.repair.rungs.loss import relative_error
from mismatch.stages.repair.rungs.module_pair import Part

CHUNK = 256  # tokens whose logits are there at once


def block(layout: Layout, layer: int) -> Part:
    """A block as a place of the store: the stream that enters and the one that leaves."""
    path = layout.slot_path(layer, "block")
    module = layout.model.get_submodule(path)
    return Part(layer, "block", path, module, module)


def final(layout: Layout) -> Part:
    """The final norm as a place of the store: what goes into the head."""
    path = layout.slot_path(None, "final_norm")
    module = layout.model.get_submodule(path)
    return Part(layout.n_layers - 1, "final_norm", path, module, module)


class WindowLoss:
    """Relative error of the stream behind block `last`.

    Args:
        student: layout of the student.
        store, held: of training and held-out text, with the places `entering` and `leaving`.
        entering, leaving: blocks; the `x` of one enters the first swapped block, the `y` of the other is the target.
    """

    def __init__(
        self, student: Layout, store: Store, held: Store, entering: Part, leaving: Part
    ) -> None:
        self.student, self.store, self.held = student, store, held
        self.entering, self.leaving = entering, leaving

    def __call__(self, index: int, rows: int) -> Tensor:
        return self._error(self.store, index, rows)

    @torch.no_grad()
    def look(self) -> float:
        n = len(self.held.batches)
        return (
            sum(float(self._error(self.held, i, len(self.held.batches[i]))) for i in range(n)) / n
        )

    def _error(self, store: Store, index: int, rows: int) -> Tensor:
        stream = store.batch(self.entering, index).x[:rows]
        target = store.batch(self.leaving, index).y[:rows]
        first, last = self.entering.layer, self.leaving.layer
        found: dict[str, Tensor] = {}
        hooks.run(
            self.student,
            store.batches[index][:rows],
            taps(self.student, last)[-1:],
            lambda _tap, value: found.__setitem__("stream", value),
            start=first,
            stop=last + 1,
            stream=stream,
        )
        return relative_error(found["stream"] - stream, target - stream)


class EndToEndLoss:
    """KL(teacher || student) of the logits, nats per token.

    Args:
        teacher, student: layouts.
        store, held: with the places `entering` and `leaving`.
        entering: block that the student starts from; its `x` is the stream.
        leaving: the final norm; its `y` is what the teacher's head gets.
    """

    def __init__(
        self,
        teacher: Layout,
        student: Layout,
        store: Store,
        held: Store,
        entering: Part,
        leaving: Part,
    ) -> None:
        self.teacher, self.student, self.store, self.held = teacher, student, store, held
        self.entering, self.leaving = entering, leaving

    def __call__(self, index: int, rows: int) -> Tensor:
        return self._kl(self.store, index, rows)

    @torch.no_grad()
    def look(self) -> float:
        n = len(self.held.batches)
        return sum(float(self._kl(self.held, i, len(self.held.batches[i]))) for i in range(n)) / n

    def _kl(self, store: Store, index: int, rows: int) -> Tensor:
        stream = store.batch(self.entering, index).x[:rows]
        theirs = store.batch(self.leaving, index).y[:rows].flatten(0, 1)
        states = hooks.run(
            self.student,
            store.batches[index][:rows],
            (),
            lambda *_: None,
            start=self.entering.layer,
            stream=stream,
        ).flatten(0, 1)
        return _HeadKL.apply(states, theirs, self.student, self.teacher)


class _HeadKL(torch.autograd.Function):
    """Mean KL over tokens from final states, without ever holding the logits of more than a chunk.

    The head is frozen. d KL / d logits = (q - p) / tokens.
    """

    @staticmethod
    def forward(ctx, states: Tensor, theirs: Tensor, student: Layout, teacher: Layout) -> Tensor:
        total = torch.zeros((), device=states.device, dtype=torch.float64)
        gradient = torch.empty_like(states) if states.requires_grad else None
        for start in range(0, len(states), CHUNK):
            at = slice(start, start + CHUNK)
            with torch.no_grad():
                p = teacher.head(theirs[at].to(states.dtype)).float().log_softmax(-1)
            with torch.enable_grad():
                own = states[at].detach().requires_grad_(gradient is not None)
                logits = student.head(own)
            with torch.no_grad():
                q = logits.detach().float().log_softmax(-1)
                total += kl(p, q).double().sum()
            if gradient is not None:
                back = (q.exp_().sub_(p.exp_())).to(logits.dtype)
                (gradient[at],) = torch.autograd.grad(logits, own, back)
        ctx.save_for_backward(gradient)
        ctx.tokens = len(states)
        return (total / len(states)).float()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream / ctx.tokens).to(gradient.dtype), None, None, None


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL per row of two log-probabilities, >= 0 (the form of `mismatch.metrics.sums.logits`)."""
    none = torch.zeros(len(p), dtype=torch.long, device=p.device)
    return LogitPair(p, q, none, none, none).kl
