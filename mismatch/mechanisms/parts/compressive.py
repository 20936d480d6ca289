"""The compressive memory of Infini-attention: how it is read and how a segment is written (arXiv 2404.07143v2).

    read      phi(Q) M / (phi(Q) z)                                           eq. 7
    linear    M <- M + phi(K)^T V                                             eq. 8
    delta     M <- M + phi(K)^T (V - phi(K) M / (phi(K) z))                   eq. 9
    z         z <- z + sum_t phi(K_t)                                         both rules

phi makes queries and keys positive. A key whose phi is 0 writes nothing.

Under one denominator with a softmax, sum_j exp(s_j) v_j + c phi(Q) M over sum_j exp(s_j) + c phi(Q) z, the memory has
the share c phi(Q) z / (sum_j exp(s_j) + c phi(Q) z) (`joint_share`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mismatch.mechanisms.parts.segments import Grid

# A smaller phi(Q) z is no memory of this query; dividing by it would overflow float32 gradients.
EMPTY = 1e-20


def weigh(phi: Tensor, norm: Tensor) -> Tensor:
    """phi(Q) z: `... pos features`, `... features` -> `... pos`."""
    return (phi @ norm.unsqueeze(-1))[..., 0]


def retrieve(phi: Tensor, memory: Tensor, norm: Tensor) -> Tensor:
    """Eq. 7: `... pos features`, `... features D`, `... features` -> `... pos D`; 0 from an empty
    memory."""
    weight = weigh(phi, norm)[..., None]
    # Filled in BEFORE the division: a `where` around 0 / 0 hides the NaN of the value and not that
    # of its gradient.
    return (phi @ memory) / weight.masked_fill(weight < EMPTY, 1.0)


def linear(phi: Tensor, v: Tensor, memory: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 8 for S complete segments at once.

    Args:
        phi: phi(K), `batch KV S N features`.
        v: `batch KV S N D`.
        memory, norm: before the first, `batch KV features D` and `batch KV features`.

    Returns:
        memory and norm BEFORE segment 0, 1, ..., S: `batch KV S+1 features D` and `batch KV S+1
        features`.
    """
    added = torch.cat([memory[:, :, None], phi.transpose(-1, -2) @ v], dim=2)
    counted = torch.cat([norm[:, :, None], phi.sum(-2)], dim=2)
    return added.cumsum(2), counted.cumsum(2)


def delta(phi: Tensor, v: Tensor, memory: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 9, segment after segment; arguments and result as for `linear`. All N reads of a segment
    see the memory before it. Writing a known pair again leaves the memory as it is, but z still
    grows: the paper's rule halves what it reads."""
    memories, norms = [memory], [norm]
    for s in range(phi.shape[2]):
        known = retrieve(phi[:, :, s], memories[-1], norms[-1])
        memories.append(memories[-1] + phi[:, :, s].transpose(-1, -2) @ (v[:, :, s] - known))
        norms.append(norms[-1] + phi[:, :, s].sum(-2))
    return torch.stack(memories, dim=2), torch.stack(norms, dim=2)


def joint_share(weight: Tensor, log_c: Tensor, lse: Tensor) -> Tensor:
    """The share of the memory under one denominator, 0 where it is empty, all of one shape.

    Args:
        weight: phi(Q) z.
        log_c: log c.
        lse: log sum_j exp(s_j).
    """
    empty = weight < EMPTY
    # No exponential of a score, which could overflow; filled in before the logarithm, as in `retrieve`.
    return torch.sigmoid(weight.masked_fill(empty, 1.0).log() + log_c - lse).masked_fill(empty, 0.0)


def not_written(grid: Grid, overlap: int, sinks: int, device: torch.device) -> Tensor:
    """Of the segments that are left behind in this call the tokens that are not written, bool `batch closed N`: those
    before the text began, and the first `sinks` of it."""
    first = grid.starts(device)[:, :1] - overlap * grid.size
    number = first + torch.arange(grid.closed * grid.size, device=device)
    return (number < sinks).unflatten(1, (grid.closed, grid.size))
