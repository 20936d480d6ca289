"""Feature maps: what makes queries and keys positive, so that phi(q) . phi(k) can stand for exp(q . k).

| name | phi(x), x a head's D channels | features | source |
|---|---|---|---|
| `elu` | ELU(x) + 1 | D | arXiv 2006.16236, eq. 7 |
| `relu` | max(x, 0) | D | arXiv 2103.13076 without its matrix |
| `exp` | [exp(x - max x), exp(min x - x)] | 2 D | arXiv 2402.04347, bounded as in the LoLCATs code |
| `softmax` | softmax([x, -x]) | 2 D | arXiv 2402.04347, W = 1 |
| `hedgehog` | softmax([W x, -W x]) | 2 D | arXiv 2402.04347 |
| `learned` | max(W x + b, 0) | D | arXiv 2103.13076 (T2R) |

W is one D x D matrix per head, identity at first, b is 0: the learned maps start as `softmax` and as
`relu` (T2R draws W at random; here the pretrained directions are where it starts). The softmax is one
over both signs, as in flash-linear-attention (there of 2 W x); the LoLCATs code takes one of W x and
one of -W x and sets them side by side.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

MapName = Literal["elu", "relu", "exp", "softmax", "hedgehog", "learned"]


def elu_plus_one(x: Tensor) -> Tensor:
    """ELU(x) + 1, as x + 1 and exp(x): `elu(x) + 1` rounds to 0 below -17 in float32, and z must
    stay > 0."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def bounded_exp(x: Tensor) -> Tensor:
    """exp of x and -x, each over its own largest: `... D` -> `... 2 D` in (0, 1]."""
    return torch.cat([x - x.amax(-1, keepdim=True), x.amin(-1, keepdim=True) - x], dim=-1).exp()


def signed_softmax(x: Tensor) -> Tensor:
    """softmax([x, -x]): `... D` -> `... 2 D`, sum 1."""
    return torch.cat([x, -x], dim=-1).softmax(-1)


ACTIVATIONS = {
    "elu": elu_plus_one,
    "relu": torch.relu,
    "exp": bounded_exp,
    "softmax": signed_softmax,
    "hedgehog": signed_softmax,
    "learned": torch.relu,
}


class FeatureMap(nn.Module):
    """One map for each of `heads` heads; only `hedgehog` and `learned` have parameters."""

    def __init__(self, name: MapName, heads: int, dim: int, kind: dict[str, Any]) -> None:
        """
        Args:
            name: of the table above.
            heads: of the tensor it is applied to.
            dim: D.
            kind: dtype and device of the parameters.
        """
        super().__init__()
        self.name = name
        if name in ("hedgehog", "learned"):
            self.weight = nn.Parameter(torch.eye(dim, **kind).repeat(heads, 1, 1))
        if name == "learned":
            self.bias = nn.Parameter(torch.zeros(heads, dim, **kind))

    def forward(self, x: Tensor) -> Tensor:
        """phi(x): `batch heads pos D` -> `batch heads pos features`, all >= 0, dtype of x."""
        if self.name in ("hedgehog", "learned"):
            x = torch.einsum("bhtd,hed->bhte", x, self.weight.to(x.dtype))
        if self.name == "learned":
            x = x + self.bias.to(x.dtype)[:, None]
        return ACTIVATIONS[self.name](x)

    def extra_repr(self) -> str:
        return self.name
