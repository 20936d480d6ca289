"""What the attention that a recurrent mixer replaces says about the initial values of the mixer.

One pass over inputs x of the layer, and through the attention's own projections, before any of them changes:

    constant     w with x.w = 1 in the mean and nearly everywhere, by ridge: after a norm x is mostly one vector, so w
                 carries a bias where none is
    distance     of each query head, the attention that keys at each distance get; the first token apart. It holds the
                 attention that is not needed (0.06 to 0.65 a head at layer 12 of SmolLM2), from whatever distance
    heads        a_h, what the attention gives its output projection

Then, for heads n_h that a mixer would give without its gate, how loud the attention is in their terms,

    rho_h = <a_h, n_h> / mean <n_h, n_h>

a linear map of x by ridge. A norm behind a mixer makes each n_h as long as any other; how much of a head's attention
lies on the first token, and so how long a_h is, is then in the gate or nowhere.

Source of the half-life: Taylor-Calibrate (arXiv 2606.16429), which takes the mean distance, the first token included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mismatch.mechanisms.parts.calling import hidden_in
from mismatch.mechanisms.parts.linears import width
from mismatch.mechanisms.parts.projections import AttentionParts

Distance = Literal["median", "mean"]
QUERIES = 128
"""Queries worked on at once; a matter of speed and memory only."""
EARLY = 8
"""Part of a text whose queries tell nothing of distances, for little stands before them: its first 1/8."""
LONGEST = 64.0
"""Tokens of a median half-life, at most: a state that hardly forgets is a sum of everything."""
FLAT, EVEN = 1e-4, 1e-3
"""Ridges of `constant` and of other maps of x, in means of the diagonal."""
LOUD, QUIET = 1.5, 0.02
"""Mean of silu(gate), where it is nearly linear, and the least that is aimed at."""
OPEN = 0.4
"""Mean of the sigmoid of a gate."""
FAINT = 1e-3
"""Mean loudness, at least: of a layer that gives nothing it would be 0."""
WRITE = -1.0
"""How much is written, before its sigmoid, for every token."""
SMALL = 0.5
"""Tap of values in front of a SiLU, at which it is linear; the norm behind undoes it."""


@runtime_checkable
class TakesStatistics(Protocol):
    """A mechanism that sets initial values from the attention it replaces. The repair stage `inherit` calls it."""

    def initial_values(self) -> Mapping[str, Callable[[Statistics], None]]:
        """By the name of a part, of `PARTS`, what sets it; without parts that it has not."""


class Statistics:
    """Of one layer's attention.

    Args:
        attention: a mechanism whose inherited projections are still the attention's.
        runs: a batch of inputs x, `batch pos d_model` of whole texts, and how the host calls a module with them.
        distance: which half-life `half_life` gives.
    """

    def __init__(
        self,
        attention: AttentionParts,
        runs: Iterable[tuple[Tensor, Callable[..., Tensor]]],
        distance: Distance = "median",
    ) -> None:
        self.attention, self.distance = attention, distance
        self.runs = list(runs)
        self.heads: list[Tensor] = []
        """Of each batch, `batch H pos D`."""
        x = torch.cat([x.flatten(0, 1) for x, _ in self.runs]).double()
        length = max(x.shape[1] for x, _ in self.runs)
        none = torch.zeros(attention.n_heads, length, dtype=torch.float64, device=x.device)
        self.on_first, self.on_others = none, none.clone()
        """Attention by distance, `H distance`: on the first token, and on all others."""
        with torch.no_grad():
            for batch, call in self.runs:
                call(self._look, batch)
        self.mean = x.mean(0)
        self._gram = x.T @ x
        flat = self._solved(x.sum(0), FLAT)
        self.constant = flat / (flat @ self.mean)

    def _look(self, *args: Any, **kwargs: Any) -> Tensor:
        x, own = hidden_in(args, kwargs), self.attention
        q, k, v = own.qkv(x)
        q, k = own.rotate(q, k, kwargs.get("position_embeddings"))
        k, v = own.per_query_head(k), own.per_query_head(v)
        length = x.shape[1]
        number, found = torch.arange(length, device=x.device), []
        for i in number[:, None].split(QUERIES):
            end = int(i[-1]) + 1
            away = i - number[:end]
            read = (away >= 0) & (away < (own.window or length))
            logits = q[:, :, i[:, 0]] @ k[:, :, :end].transpose(-1, -2) * own.scaling
            if own.softcap is not None:
                logits = torch.tanh(logits / own.softcap) * own.softcap
            weights = logits.float().masked_fill(~read, -torch.inf).softmax(-1)
            found.append(weights.to(v.dtype) @ v[:, :, :end])
            late = i[:, 0] >= length // EARLY
            weights, away = weights.sum(0)[:, late].double(), away[late].clamp(min=0)
            self.on_first.index_add_(1, away[:, 0], weights[..., 0])
            self.on_others.index_add_(1, away[:, 1:].flatten(), weights[..., 1:].flatten(1))
        self.heads.append(torch.cat(found, dim=2))
        return x

    def half_life(self, heads: int) -> Tensor:
        """Tokens after which a state of each of `heads` should have lost half: float64 `heads`.

        median   the distance within which half of the attention lies, the first token's left out
        mean     as published: the mean distance, the first token included
        """
        first, others = (
            at.unflatten(0, (heads, -1)).sum(1) for at in (self.on_first, self.on_others)
        )
        if self.distance == "median":
            within = others.cumsum(1) / others.sum(1, keepdim=True)
            return 1.0 + (within < 0.5).sum(1).double().clamp(max=LONGEST - 1)
        at = first + others
        tokens = torch.arange(at.shape[1], dtype=at.dtype, device=at.device)
        return (at @ tokens / at.sum(1)).clamp(min=1.0)

    def beyond(self, window: int, *, first: bool) -> Tensor:
        """The share of each query head's attention on tokens at least so far away, the first token among them or not:
        float64 `H`."""
        far = self.on_others[:, window:].sum(1)
        far = far + self.on_first[:, window:].sum(1) if first else far
        return far / (self.on_first + self.on_others).sum(1)

    def map_of(self, targets: Callable[[Tensor], Tensor]) -> Tensor:
        """The linear map of x that comes closest to `targets(x)`, `tokens n`, by ridge: `n d_model`."""
        x = torch.cat([x.flatten(0, 1) for x, _ in self.runs])
        return self._solved(x.double().T @ targets(x).double(), EVEN).T

    def loudness(self, plain: Callable[..., Tensor]) -> Tensor:
        """rho as a linear map of x, `H d_model`.

        Args:
            plain: called as the module; gives heads without gate, `batch H pos D`.
        """
        heads = [call(plain, x).float() for x, call in self.runs]
        both = [(a.float() * n).sum(-1) for a, n in zip(self.heads, heads, strict=True)]
        size = torch.stack([n.square().sum(-1).mean((0, 2)) for n in heads]).mean(0)
        rho = [(one / size[:, None]).transpose(1, 2).flatten(0, 1) for one in both]
        return self.map_of(lambda _x: torch.cat(rho))

    def _solved(self, right: Tensor, ridge: float) -> Tensor:
        size = self._gram.diagonal().mean()
        eye = torch.eye(len(self._gram), dtype=torch.float64, device=right.device)
        return torch.linalg.solve(self._gram + ridge * size * eye, right)


def keys(attention: AttentionParts) -> dict[str, Callable[[Statistics], None]]:
    """The part `keys`, where keys are not values, too."""
    separate = len(attention._inputs) == 3 and getattr(attention, "v_proj", None) is None
    return {} if separate else {"keys": partial(centre_keys, attention)}


def centre_keys(attention: AttentionParts, statistics: Statistics) -> None:
    """Take the mean key out of the projection, by its bias or along `constant`."""
    linear, rows = key_rows(attention)
    weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    shared = weight[rows].double() @ statistics.mean
    if linear.bias is not None:
        linear.bias[rows] = (-shared).to(linear.bias)
    else:
        weight[rows] -= torch.outer(shared, statistics.constant).to(weight)


def silu_gate(statistics: Statistics, plain: Callable[..., Tensor]) -> tuple[Tensor, float]:
    """What a gate behind the norm of a mixer should be: `H d_model` weights of z such that silu(z) = scale * rho, and
    the scale, for the norm to undo.

    Args:
        plain: as for `Statistics.loudness`.
    """
    loud = statistics.loudness(plain)
    scale = LOUD / (loud @ statistics.mean).mean().clamp(min=FAINT).item()
    weights = statistics.map_of(
        lambda x: silu_inverse((scale * x.double() @ loud.T).clamp(min=QUIET))
    )
    return weights, scale


def sigmoid_gate(
    statistics: Statistics, plain: Callable[..., Tensor], *, alike: bool
) -> tuple[Tensor, Tensor]:
    """The same with a sigmoid: weights of z such that sigmoid(z) = rho / scale, `H d_model`, and the scale of each
    head, float64 `H`; one for all where `alike`."""
    loud = statistics.loudness(plain)
    scale = (loud @ statistics.mean).clamp(min=FAINT) / OPEN
    scale = scale.mean().expand_as(scale) if alike else scale
    weights = statistics.map_of(
        lambda x: (x.double() @ loud.T / scale).clamp(QUIET, 1 - QUIET).logit()
    )
    return weights, scale


def scale_values(attention: AttentionParts, statistics: Statistics) -> bool:
    """Scale what each head gives by sigma_h = sum <a_h, h_h> / sum <h_h, h_h>, clamped to 0.1 .. 10, as published; in
    the output projection, for in front of it a norm would undo it. False where there is none, or a gate before it."""
    linear = getattr(attention, attention._output)
    if isinstance(linear, nn.Identity) or attention.gated:
        return False
    given: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    try:
        for x, call in statistics.runs:
            call(attention, x)
    finally:
        handle.remove()
    own = torch.cat([h.flatten(0, 1) for h in given]).unflatten(-1, (attention.n_heads, -1))
    theirs = torch.cat([a.transpose(1, 2).flatten(0, 1) for a in statistics.heads])
    scale = ((own * theirs).sum((0, 2)) / own.square().sum((0, 2))).clamp(0.1, 10.0)
    columns = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    columns *= scale.repeat_interleave(attention.head_dim).to(columns)
    return True


def key_rows(attention: AttentionParts) -> tuple[nn.Linear | Conv1D, Tensor]:
    """The linear map that makes the keys, and which of its outputs they are."""
    heads, keys = (n * attention.head_dim for n in (attention.n_heads, attention.n_kv_heads))
    name = attention._inputs[1 if len(attention._inputs) == 3 else 0]
    linear: Any = getattr(attention, name)
    rows = torch.arange(width(linear), device=linear.weight.device)
    if name == "query_key_value":
        rows = rows.view(attention.n_heads, 3, -1)[:, 1].flatten()
    elif len(attention._inputs) == 1:
        rows = rows[heads : heads + keys]
    return linear, rows


def softplus_inverse(y: Tensor) -> Tensor:
    """z with softplus(z) = y > 0."""
    return y + torch.log(-torch.expm1(-y))


def silu_inverse(y: Tensor) -> Tensor:
    """z > 0 with silu(z) = y > 0, by Newton's method."""
    z = y + 0.5
    for _ in range(30):
        share = torch.sigmoid(z)
        z = z - (z * share - y) / (share * (1 + z * (1 - share)))
    return z
