"""Exact softmax attention in blocks of keys, in one process or with the tokens spread over several.

For one query row, with block after block of keys (online softmax; Ring Attention arXiv 2310.01889,
section 2 and algorithm 1):

    s  = cap(scale q k^T), -inf where the query may not read
    m' = max(m, max s)        p = exp(s - m')
    o  = o exp(m - m') + p v  l = l exp(m - m') + sum p         m = m'
    out = o / l               lse = m + log l

Backward computes the blocks again from lse, so that nothing of size queries x keys is kept
(FlashAttention-2 arXiv 2307.08691, algorithm 2):

    p = exp(s - lse)          d = sum(dout out)
    dv += p^T dout            ds = p (dout v^T - d) (1 - (s / cap)^2)
    dk += scale ds^T q        dq += scale ds k

Spread over processes, rank r holds the r-th run of the tokens. Its queries stay; keys and values go
round the ring r -> r + 1, in the backward pass together with their gradients, which are complete when
they are back at their rank. Only neighbours exchange data (gloo or nccl). Runs are contiguous, so under a causal mask
later ranks have more to do than earlier ones.

All sums in float32 at least. No second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from mismatch.errors import SurgeryError

QUERIES = 1024
"""Queries worked on at once; a matter of speed and memory only."""


@dataclass(frozen=True)
class Reads:
    """Which query reads which key, and how scores are made.

    Attributes:
        scale: of the scores.
        softcap: bound of the scores, or None.
        window: tokens that a query reads at most, itself included, or None.
        block: keys worked on at once.
        first: number of the first query in the text.
        mask: the host's mask besides that, `batch or 1, 1, queries, keys`, bool or added; or None.
        real: bool `batch keys`, which keys are no pads; None = all.
        group: the processes that share the text, or None.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    block: int = 256
    first: int = 0
    mask: Tensor | None = None
    real: Tensor | None = None
    group: Any = None

    def blocks(self, start: int, keys: int, queries: int) -> Iterator[tuple[slice, slice, int]]:
        """The blocks of a run of keys that starts at token `start`: keys, some of the queries that may
        read any of them, and the number of the first key."""
        for at in range(0, keys, self.block):
            end = min(at + self.block, keys)
            low = max(0, start + at - self.first)
            high = queries
            if self.window is not None:
                high = min(queries, start + end - 1 + self.window - self.first)
            for row in range(low, high, QUERIES):
                yield slice(at, end), slice(row, min(row + QUERIES, high)), start + at

    def _read_whole(self, rows: slice, start: int, keys: int) -> bool:
        """Whether each of these queries reads each of these keys."""
        within = self.window is None or self.first + rows.stop - 1 - start < self.window
        past = start + keys - 1 <= self.first + rows.start
        return past and within and self.mask is None and self.real is None

    def hide(self, scores: Tensor, keys: slice, rows: slice, start: int, group: int) -> Tensor:
        """Scores with -inf where the query may not read.

        Args:
            scores: `batch KV queries*group keys`, the query heads of one kv head side by side.
            keys, rows, start: of the block, from `blocks`.
            group: query heads per kv head.
        """
        if self._read_whole(rows, start, scores.shape[-1]):
            return scores
        i = self.first + torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
        j = start + torch.arange(scores.shape[-1], device=scores.device)
        allowed = (j <= i)[None, None]
        if self.window is not None:
            allowed = allowed & (i - j < self.window)
        if self.real is not None:
            allowed = allowed & self.real[:, None, None, keys]
        if self.mask is not None:
            given = self.mask[:, :, rows, keys]
            if given.dtype == torch.bool:
                allowed = allowed & given
            else:
                scores = scores + given.repeat_interleave(group, dim=-2)
        return scores.masked_fill(~allowed.repeat_interleave(group, dim=-2), -torch.inf)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, reads: Reads) -> Tensor:
    """Causal softmax attention, to rounding that of one matrix of scores.

    Args:
        q: `batch H queries D`; query head h reads kv head h // (H / KV).
        k, v: `batch KV keys D`. With a group: this rank's run of the text, as many as queries.
        reads: what is read, and by which processes. With a group every rank must come here, and to
            the backward, in the same order; `first` is then computed from the runs' lengths.

    Returns:
        `batch H queries D` in the dtype of v.

    Raises:
        SurgeryError: a group together with a mask or pads; or runs of other lengths than the
            queries.
    """
    ring = None
    if reads.group is not None:
        if reads.mask is not None or reads.real is not None or q.shape[2] != k.shape[2]:
            raise SurgeryError(
                f"attention over {distributed.get_world_size(reads.group)} processes got "
                f"{q.shape[2]} queries, {k.shape[2]} keys, mask={reads.mask is not None}, "
                f"pads={reads.real is not None}; it takes a run of tokens without mask or pads",
                hint="give every process its run of one unpadded text, without a cache",
            )
        ring = Ring(reads.group, k.shape[2], k.device)
        reads = replace(reads, first=ring.start(0))
    return _Attention.apply(q, k, v, reads, ring)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, reads: Reads, ring: Ring | None
    ) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            rows, group = _rows(q, k.shape[1]), q.shape[1] // k.shape[1]
            top = rows.new_full((*rows.shape[:3], 1), -torch.inf)
            weight, out = torch.zeros_like(top), torch.zeros_like(rows)
            for start, (k_run, v_run) in _runs(ring, k, v):
                for keys, queries, at in reads.blocks(start, k_run.shape[2], q.shape[2]):
                    at_rows = slice(queries.start * group, queries.stop * group)
                    scores = _scores(rows[:, :, at_rows], k_run[:, :, keys], reads)
                    scores = reads.hide(scores, keys, queries, at, group)
                    new = torch.maximum(top[:, :, at_rows], scores.amax(-1, keepdim=True))
                    # A row that has read nothing yet: -inf - -inf would be NaN.
                    shift = new.masked_fill(new == -torch.inf, 0.0)
                    old, p = (top[:, :, at_rows] - shift).exp(), (scores - shift).exp()
                    out[:, :, at_rows] = out[:, :, at_rows] * old + p @ _wide(v_run[:, :, keys])
                    weight[:, :, at_rows] = weight[:, :, at_rows] * old + p.sum(-1, keepdim=True)
                    top[:, :, at_rows] = new
            empty = weight == 0  # a query that may read nothing, such as a pad, reads 0
            out = out / weight.masked_fill(empty, 1.0)
            lse = (top + weight.log()).masked_fill(empty, torch.inf)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.reads, ctx.ring = reads, ring
        return _heads(out, q.shape).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        reads, ring = ctx.reads, ctx.ring
        with torch.autocast(q.device.type, enabled=False):
            rows, grad_rows = _rows(q, k.shape[1]), _rows(grad, k.shape[1])
            group = q.shape[1] // k.shape[1]
            share = (grad_rows * out).sum(-1, keepdim=True)
            dq = torch.zeros_like(rows)
            steps = 1 if ring is None else ring.world
            run = [k, v, *(torch.zeros_like(x, dtype=rows.dtype) for x in (k, v))]
            for step in range(steps):
                k_run, v_run, dk, dv = run
                start = 0 if ring is None else ring.start(step)
                for keys, queries, at in reads.blocks(start, k_run.shape[2], q.shape[2]):
                    at_rows = slice(queries.start * group, queries.stop * group)
                    scores = _scores(rows[:, :, at_rows], k_run[:, :, keys], reads)
                    p = reads.hide(scores, keys, queries, at, group) - lse[:, :, at_rows]
                    p, g = p.exp(), grad_rows[:, :, at_rows]
                    dv[:, :, keys] += p.mT @ g
                    ds = p * (g @ _wide(v_run[:, :, keys]).mT - share[:, :, at_rows])
                    if reads.softcap is not None:
                        ds = ds * (1 - (scores / reads.softcap).square())
                    ds = ds * reads.scale
                    dk[:, :, keys] += ds.mT @ rows[:, :, at_rows]
                    dq[:, :, at_rows] += ds @ _wide(k_run[:, :, keys])
                if ring is not None:  # on the last step only the gradients go to their rank
                    run = ring.pass_on(step, run if step < steps - 1 else run[2:])()
            dk, dv = run[-2:]
        return _heads(dq, q.shape).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _runs(ring: Ring | None, k: Tensor, v: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """Each rank's keys and values in turn, with the number of their first token; own ones first."""
    run = [k, v]
    if ring is None:
        yield 0, run
        return
    for step in range(ring.world):
        last = step == ring.world - 1
        arrive = None if last else ring.pass_on(step, run)  # travels while this run is worked on
        yield ring.start(step), run
        if arrive is not None:
            run = arrive()


class Ring:
    """Which rank holds which run of the text, and sending runs on to the next rank."""

    def __init__(self, group: Any, length: int, device: Any) -> None:
        """
        Args:
            group: the processes, in the order of the text.
            length: tokens of this rank.
            device: that the processes can exchange tensors from.
        """
        self.group = group
        self.rank, self.world = distributed.get_rank(group), distributed.get_world_size(group)
        self.lengths = gathered(group, length, device)

    def owner(self, step: int) -> int:
        """The rank whose run is here at a step."""
        return (self.rank - step) % self.world

    def start(self, step: int) -> int:
        """The number of the first token of the run that is here at a step."""
        return sum(self.lengths[: self.owner(step)])

    def pass_on(self, step: int, run: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Start to send a run to the next rank; the result waits for that of the rank before."""
        length = self.lengths[self.owner(step + 1)]
        coming = [x.new_empty(*x.shape[:2], length, x.shape[3]) for x in run]
        ahead, behind = (
            distributed.get_global_rank(self.group, (self.rank + d) % self.world) for d in (1, -1)
        )
        going = [x.contiguous() for x in run]
        work = distributed.batch_isend_irecv(
            [distributed.P2POp(distributed.isend, x, ahead, self.group) for x in going]
            + [distributed.P2POp(distributed.irecv, x, behind, self.group) for x in coming]
        )

        def arrive(going: list[Tensor] = going) -> list[Tensor]:  # kept alive until it is sent
            for request in work:
                request.wait()
            return coming

        return arrive


def gathered(group: Any, number: int, device: Any) -> list[int]:
    """The number of every rank."""
    mine = torch.tensor([number], device=device)
    every = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(every, mine, group=group)
    return [int(x) for x in every]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(x: Tensor, kv_heads: int) -> Tensor:
    """`batch H pos D` -> `batch KV pos*group D` in float32 at least: all rows that read one kv
    head."""
    return _wide(x.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(2, 3))


def _heads(rows: Tensor, shape: torch.Size) -> Tensor:
    """Back from `_rows` to `shape`, `batch H pos D`."""
    return rows.unflatten(2, (shape[2], -1)).transpose(2, 3).flatten(1, 2)


def _scores(rows: Tensor, k: Tensor, reads: Reads) -> Tensor:
    scores = rows @ _wide(k).mT * reads.scale
    return scores if reads.softcap is None else torch.tanh(scores / reads.softcap) * reads.softcap
