"""How much each token counts when outputs are matched.

The loss of every local stage is the error relative to the size of what is matched,

    sum_t w_t ||student_t - teacher_t||^2 / sum_t w_t ||teacher_t||^2,     w_t = 1 / max(||teacher_t||, median)^2

0 for a perfect copy, 1 for a module that gives nothing. Without w, a massive token (norms of thousands where the others
have tens) IS the loss, and nothing else is trained; with it no token counts more than a usual one.

Several ranks share the rows of a batch: each runs the module on its own rows alone, and weighs them by the targets of
the whole batch. The losses of the ranks add up to the loss of the batch, and so do their gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mismatch.stages.repair.ladder_stages.activation_store import Store


class Loss(ABC):
    """What a stage lowers: of batches of the training text, and of the validation text without a gradient.

    Args:
        store, held: activations of either text; the ranks that share the former share this.
    """

    def __init__(self, store: Store, held: Store) -> None:
        self.store, self.held, self.ranks = store, held, store.ranks

    @abstractmethod
    def of(self, store: Store, index: int, rows: int, mine: slice) -> Tensor:
        """What the rows `mine`, of the first `rows` of a batch, add to its loss: a scalar with a gradient."""

    def __call__(self, index: int, rows: int) -> Tensor:
        """This rank's part of the loss of the first rows of a batch; a rank without a row adds a constant 0."""
        if self.ranks.rank >= min(rows, len(self.store.batches[index])):
            return torch.zeros((), requires_grad=True)
        return self.of(self.store, index, rows, slice(self.ranks.rank, None, self.ranks.world))

    @torch.no_grad()
    def look(self) -> float:
        """The mean over batches of the validation text; the ranks share the batches."""
        sizes = [len(ids) for ids in self.held.batches]

        def error(index: int) -> float:
            return float(self.of(self.held, index, sizes[index], slice(None)))

        return sum(self.ranks.shared(range(len(sizes)), error)) / len(sizes)


def weights(target: Tensor) -> Tensor:
    """`batch pos`, of the targets `batch pos d` of one batch, float32 at least."""
    size = target.norm(dim=-1)
    floor = size.median().clamp(min=torch.finfo(size.dtype).tiny)
    return torch.maximum(size, floor).pow(-2)


def relative_error(output: Tensor, target: Tensor, mine: slice = slice(None)) -> Tensor:
    """The weighed squared error of a batch over that of giving nothing: a scalar, differentiable.

    Args:
        output: `rows pos d`, of the rows `mine` of the batch.
        target: `batch pos d`, whole.
        mine: the rows whose error is counted.
    """
    weight = weights(target)
    lost = (weight[mine] * (output.to(target.dtype) - target[mine]).square().sum(-1)).sum()
    return lost / (weight * target.square().sum(-1)).sum()
