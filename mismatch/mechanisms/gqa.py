"""gqa: fewer kv heads. Neighbouring ones become one, turned towards each other first; nothing is trained.

    k_c = sum_{h in c} P_h k_h        k_h ~ U_h k_c,  so queries of kv head h become   q U_h
    v_c = sum_{h in c} N_h v_h        v_h ~ E_h v_c,  so W_o of its heads becomes      W_o E_h

Source: grouped queries and mean pooling of heads, Ainslie et al., arXiv 2305.13245, section 2.1; turning heads before
they are pooled (Procrustes), Jin et al., arXiv 2412.20677; principal components across heads inside each rotary pair,
TransMLA, arXiv 2502.07864. A map of keys must commute with the rotary embedding, which turns each pair of channels by
an angle of its own: inside a pair it is one complex number u_h (a turn and a length), never a mix of pairs. Channels
without rotation and values take any map. Everything is folded into the four projections: the result is an ordinary
attention with fewer kv heads, and a cache as much smaller.

    merge=pca         u: first component of the heads' Gram matrix in each pair; E: the first D components of all values
                      of the group: least squares, in which an error of a key counts by the queries that read it, one of
                      a value by W_o
    merge=procrustes  turns alone (orthogonal, |u| = 1), each towards the mean of all, then the mean
    merge=mean        no turn: the mean, as published first

Gram matrices are those of the calibration text (`parts/input_moment.py`), or with init=weights of the weights alone,
where all errors count alike (as values do in some heads of a layer, where W_o stands outside).
The repair stage `closed-form` then fits W_o anew.

Inherited: nothing but the output projection's bias. New: four projections, smaller by the kv heads that are gone.
Dropped: the old ones. Refused: norms between projections and heads (qwen3, gemma3, olmo2 ...), which no turn passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from mismatch.errors import ConfigError
from mismatch.mechanisms.base import Context, tensor_kind
from mismatch.mechanisms.parts.host_softmax import HostSoftmax
from mismatch.mechanisms.parts.input_moment import (
    InputMoment,
    key_metric,
    moment,
    root,
    value_metric,
)
from mismatch.mechanisms.parts.linears import linear
from mismatch.mechanisms.parts.projections import SEPARATE, refuse_norms
from mismatch.mechanisms.parts.rotary_pairs import pair_gram, real_maps, rotary_width

ROUNDS = 30
"""Of turning heads towards their mean, which stands still long before."""


@dataclass(frozen=True)
class GQAConfig:
    groups: Annotated[int, ">= 1"]
    """Kv heads that are left; a divisor of those of the module."""
    merge: Literal["pca", "procrustes", "mean"] = "pca"
    """How the kv heads of a group become one."""
    init: Literal["text", "weights"] = "text"
    """Whether heads are compared by what they give on calibration text, or by their weights alone."""


class GQA(HostSoftmax):
    """Softmax attention with fewer kv heads, from those of the attention that it replaces."""

    Config = GQAConfig
    slots = ("attn",)
    heads = True
    identity = "groups = the module's kv heads"
    state = "the host's KV cache, of the kv heads that are left"
    source = "arXiv 2305.13245, section 2.1; turns: arXiv 2412.20677, 2502.07864"

    def __init__(self, original: nn.Module, config: GQAConfig, context: Context) -> None:
        """Raises:
        ConfigError: groups that do not divide the kv heads.
        SurgeryError: norms or a gate between projections and heads; no calibration.
        """
        super().__init__(original, config, context)
        refuse_norms(self)
        had, groups = self.n_kv_heads, config.groups
        if had % groups:
            fit = [n for n in range(1, had + 1) if had % n == 0]
            raise ConfigError(
                f"`groups` must divide the module's {had} kv heads, got {groups}",
                hint=f"one of {', '.join(map(str, fit))}",
                argument="groups",
            )
        self._had = had
        c = moment(original, context, "gqa", config.init if config.merge != "mean" else "weights")
        q, k, v = (w.unflatten(0, (-1, self.head_dim)) for w in self.affine())
        output = self.output_matrix().to(q)
        turns = merged_k = spread = merged_v = q.new_zeros(had, self.head_dim, self.head_dim)
        if c is not None:
            c, width = c.to(q.device), rotary_width(self)
            by_query = by_output = (torch.eye(self.head_dim).to(q).expand_as(turns),) * 2
            if config.merge == "pca" and config.init == "text":
                by_query = _pair_root(key_metric(q, c, had), width)
                by_output = root(value_metric(output, had))
            turns, merged_k = self._maps(k, c, width, *by_query)
            spread, merged_v = self._maps(v, c, 0, *by_output)
        self._fold(
            turns.mT.repeat_interleave(self.group, dim=0) @ q,
            (merged_k @ k).unflatten(0, (groups, -1)).sum(1),
            (merged_v @ v).unflatten(0, (groups, -1)).sum(1),
            torch.einsum("ohd,hde->ohe", output, spread.repeat_interleave(self.group, dim=0)),
        )
        self.n_kv_heads = groups

    @classmethod
    def calibrator(cls, config: GQAConfig) -> InputMoment | None:
        plain = config.merge == "mean" or config.init == "weights"
        return None if plain else InputMoment()

    def notes(self) -> tuple[str, ...]:
        held, before = (2 * heads * self.head_dim for heads in (self.n_kv_heads, self._had))
        return (f"the cache holds {held} numbers a token, not {before}",)

    def _maps(
        self, w: Tensor, c: Tensor, width: int, root: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What brings a merged head back to each of its heads, and the part of each in it: `KV D D`, twice.

        Args:
            w: `KV D d_model+1`.
            c: second moment of the inputs.
            width: channels that are rotated.
            root, inverse: of the metric in which an error counts, `KV D D`; they pass through the rotation.
        """
        if len(w) == self.settings.groups:  # each head stays what it is, whatever the dtype
            return (torch.eye(self.head_dim).to(w).expand(len(w), -1, -1),) * 2
        found = []
        for heads in (root @ w).split(len(w) // self.settings.groups):
            size, flat = len(heads), heads.flatten(0, 1)
            gram = (flat @ c @ flat.mT).unflatten(1, (size, -1)).unflatten(0, (size, -1))
            pairs = _merging(pair_gram(gram, width), size, self.settings.merge)
            free = gram[:, width:, :, width:].flatten(0, 1).flatten(1, 2)
            rest = _merging(free, size, self.settings.merge)
            # `pairs size 1 1` complex, and `size D-W D-W`.
            found.append([real_maps(p[..., 0, 0].T, r) for p, r in zip(pairs, rest, strict=True)])
        back, into = (torch.cat(maps) for maps in zip(*found, strict=True))
        return inverse @ back, into @ root

    def _fold(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor) -> None:
        """Put the merged heads into projections of their own.

        Args:
            q, k, v: weights and biases, `heads D d_model+1`.
            output: of the merged values, `out H D`.
        """
        old: list[Any] = [getattr(self, name) for name in self._inputs]
        kind = tensor_kind(self, self.context)
        for name in self._inputs:
            del self._modules[name]
        self._inputs, self.grouped = SEPARATE[0], True
        for at, heads in enumerate((q, k, v)):
            flat, biased = heads.flatten(0, 1), old[at % len(old)].bias is not None
            new = linear(flat[:, :-1], flat[:, -1] if biased else None, kind)
            setattr(self, self._inputs[at], new)
        bias = getattr(getattr(self, self._output), "bias", None)
        setattr(self, self._output, linear(output.flatten(1), bias, kind))


def _pair_root(metric: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """As `root`, of the part of a metric that passes through the rotation: one number a pair, and the free channels."""
    half = width // 2
    size = metric.diagonal(dim1=1, dim2=2)
    size = size[:, :half] + size[:, half:width]
    whole, free = root(torch.diag_embed(size)), root(metric[:, width:, width:])
    pairs = (one.diagonal(dim1=1, dim2=2).to(torch.complex128) for one in whole)
    back, into = (real_maps(p, f) for p, f in zip(pairs, free, strict=True))
    return back, into


def _merging(gram: Tensor, size: int, merge: str) -> tuple[Tensor, Tensor]:
    """U and P with x_h ~ U_h m and m = sum_h P_h x_h, of `size` heads: `... size n n` each.

    Args:
        gram: E[x_h x_h'^*], `... size*n size*n`, real or complex.
        merge: as of the config.
    """
    n = gram.shape[-1] // size
    if merge == "mean":
        eye = torch.eye(n).to(gram).expand(*gram.shape[:-2], size, n, n)
        return eye, eye / size
    first = torch.linalg.eigh(gram).eigenvectors[..., gram.shape[-1] - n :].unflatten(-2, (size, n))
    if merge == "pca":
        return first, first.mH
    turn = _turn(first)
    for _ in range(ROUNDS):
        turn = _turn((gram @ turn.flatten(-3, -2)).unflatten(-2, (size, n)))
    return turn, turn.mH / size


def _turn(x: Tensor) -> Tensor:
    """The orthogonal (unitary) matrix that is nearest: `... n n`."""
    u, _, vh = torch.linalg.svd(x)
    return u @ vh
