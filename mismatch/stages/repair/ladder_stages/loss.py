"""How much each token counts when outputs are matched.

The loss of every local stage is the error relative to the size of what is matched,

    sum_t w_t ||student_t - teacher_t||^2 / sum_t w_t ||teacher_t||^2,     w_t = 1 / max(||teacher_t||, median)^2

0 for a perfect copy, 1 for a module that gives nothing. Without w, a massive token (norms of thousands where the others
have tens) IS the loss, and nothing else is trained; with it no token counts more than a usual one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mismatch.stages.repair.ladder_stages.activation_store import Store


class Loss(ABC):
    """What a stage lowers: of batches of the training text, and of the validation text without a gradient.

    Args:
        store, held: activations of either text.
    """

    def __init__(self, store: Store, held: Store) -> None:
        self.store, self.held = store, held

    @abstractmethod
    def of(self, store: Store, index: int, rows: int) -> Tensor:
        """The loss of the first rows of a batch: a scalar with a gradient."""

    def __call__(self, index: int, rows: int) -> Tensor:
        return self.of(self.store, index, rows)

    @torch.no_grad()
    def look(self) -> float:
        """The mean over batches of the validation text."""
        batches = self.held.batches
        return sum(float(self.of(self.held, i, len(b))) for i, b in enumerate(batches)) / len(
            batches
        )


def weights(target: Tensor) -> Tensor:
    """`batch pos`, of the targets `batch pos d` of one batch, float32 at least."""
    size = target.norm(dim=-1)
    floor = size.median().clamp(min=torch.finfo(size.dtype).tiny)
    return torch.maximum(size, floor).pow(-2)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """The weighed squared error of a batch over that of giving nothing: a scalar, differentiable."""
    weight = weights(target)
    lost = (weight * (output.to(target.dtype) - target).square().sum(-1)).sum()
    return lost / (weight * target.square().sum(-1)).sum()
