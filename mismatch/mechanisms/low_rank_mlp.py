"""low_rank_mlp: each matrix of an MLP becomes a product of two narrow ones, by its singular values.

    W ~ U_r S_r V_r^T = (U_r S_r^1/2) (S_r^1/2 V_r^T)      the r largest singular values

The best approximation of rank r in the Frobenius norm (Eckart and Young, 1936): of the weights, not
of what they do to the activations that come. Cost: a matrix of m x n takes r (m + n) values and as
many multiplications, less than m n only while r < m n / (m + n) (419 for SmolLM2's 576 x 1536); the
plan notes where it is more. The decomposition itself is done once, in float64. Inherited: biases
and the nonlinearity. New: the two factors of each matrix. Dropped: the matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context, Wrapper
from mismatch.mechanisms.parts.linears import (
    LinearLayer,
    dense,
    grafted,
    linear_layers,
    matrix,
    put,
)


@dataclass(frozen=True)
class LowRankMLPConfig:
    rank: Annotated[int, ">= 1"] = 64
    """Singular values that are kept of each matrix; more than it has means all."""


class LowRankMLP(Wrapper):
    """The MLP with factored matrices."""

    Config = LowRankMLPConfig
    slots = ("mlp",)
    identity = "rank >= the smaller side of every matrix"
    state = "none"
    merges = True
    source = "truncated singular value decomposition (Eckart and Young, 1936)"

    def __init__(self, original: nn.Module, config: LowRankMLPConfig, context: Context) -> None:
        """Raises:
        SurgeryError: a module without a matrix.
        """
        tree = grafted(original)
        layers = linear_layers(tree)
        if not layers:
            raise SurgeryError(
                f"{context.where}: {type(original).__name__} has no linear layer to factor"
            )
        super().__init__(tree, config, context)
        self._larger: list[str] = []
        for path, layer in layers.items():
            layer = dense(layer, context)
            put(tree, path, Factored(layer, config.rank, context.restoring))
            m, n = matrix(layer).shape
            if config.rank * (m + n) > m * n:
                self._larger.append(f"`{path}` ({m} x {n})")

    def merged(self) -> nn.Module:
        for path, layer in list(self.original.named_modules()):
            if isinstance(layer, Factored):
                put(self.original, path, layer.product())
        return self.original

    def notes(self) -> tuple[str, ...]:
        if not self._larger:
            return ()
        return (
            f"rank {self.settings.rank} takes more values than the whole matrix in "
            + ", ".join(self._larger),
        )


class Factored(nn.Module):
    """`up @ down` in place of the weight of a linear layer, whose bias it shares.

    Args:
        layer: the linear layer.
        rank: width of the product; at most the smaller side of the weight.
        empty: zeros are enough, the factors are read from a checkpoint.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: LinearLayer, rank: int, empty: bool = False) -> None:
        super().__init__()
        full = matrix(layer)
        rank = min(rank, *full.shape)
        if full.is_meta or empty:
            down, up = full.new_zeros(rank, full.shape[1]), full.new_zeros(full.shape[0], rank)
        else:
            u, s, vt = torch.linalg.svd(full.double(), full_matrices=False)
            half = s[:rank].sqrt()
            down = (half[:, None] * vt[:rank]).to(full.dtype)
            up = (u[:, :rank] * half).to(full.dtype)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up.contiguous())
        self.register_parameter("bias", layer.bias)

    def product(self) -> nn.Linear:
        """One matrix in place of the two; it shares the bias."""
        full = (self.up.detach().double() @ self.down.detach().double()).to(self.up.dtype)
        layer: Any = nn.Linear(full.shape[1], full.shape[0], bias=False, device="meta")
        layer.weight, layer.bias = nn.Parameter(full, requires_grad=False), self.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up, self.bias)
