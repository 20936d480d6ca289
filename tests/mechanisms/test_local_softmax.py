"""The local softmax against one masked softmax over the whole text, token by token in Python."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from mismatch.mechanisms.parts.local_softmax import (
    Kept,
    Pair,
    earlier_after,
    earlier_before,
    first_tokens,
    local_softmax,
)
from mismatch.mechanisms.parts.segments import Grid

N, H, KV, D = 4, 4, 2, 6
SCALING = 0.7


def made(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def chosen(kv: int, far: int, sinks: int, slots: int) -> list[int]:
    """Some far tokens that are no sinks, others for each kv head and number of them."""
    return [j for j in range(sinks, far) if (7 * j + kv) % 3][: max(0, slots - kv)]


def stands_for(j: int) -> int:
    """Of how many tokens a chosen one takes the place."""
    return 1 + j % 3


def inputs():
    return tuple(made(2, heads, 23, D, seed=seed) for seed, heads in enumerate((H, KV, KV)))


@functools.cache
def wanted(row, pads, case):
    return plain(*(x[row, :, pads:] for x in inputs()), *case)


def plain(q, k, v, overlap, sinks, slots, window, softcap):
    """One row: `heads pos D` and `heads pos`."""
    heads, lses = torch.zeros_like(q), torch.zeros(q.shape[:2], dtype=q.dtype)
    for h in range(H):
        kv = h // (H // KV)
        for t in range(q.shape[1]):
            start = max(0, (t // N - overlap) * N)
            near = [j for j in range(start, t + 1) if window is None or t - j < window]
            picked = chosen(kv, start, sinks, slots)
            read = [*range(min(sinks, start)), *picked, *near]
            logits = [SCALING * float(q[h, t] @ k[kv, j]) for j in read]
            if softcap is not None:
                logits = [softcap * math.tanh(logit / softcap) for logit in logits]
            times = [stands_for(j) if j in picked else 1 for j in read]
            weights = [n * math.exp(logit) for n, logit in zip(times, logits, strict=True)]
            lses[h, t] = math.log(sum(weights))
            for weight, j in zip(weights, read, strict=True):
                heads[h, t] += weight / sum(weights) * v[kv, j]
    return heads, lses


def kept(grid, k, v, overlap, sinks, slots):
    """The chosen keys before each segment of the grid, of rows `batch KV pos D` of real tokens."""
    batch, columns = len(k), slots
    found = [torch.zeros(batch, KV, grid.count, columns, D, dtype=k.dtype) for _ in range(2)]
    log_count = k.new_full((batch, KV, grid.count, columns), -torch.inf)
    starts = grid.starts("cpu") - overlap * N
    for b in range(batch):
        for kv in range(KV):
            for s in range(grid.count):
                picked = chosen(kv, max(0, int(starts[b, s])), sinks, slots)
                picked = [j for j in picked if j < k.shape[2]]
                for into, x in zip(found, (k, v), strict=True):
                    into[b, kv, s, : len(picked)] = x[b, kv, picked]
                times = torch.tensor([stands_for(j) for j in picked], dtype=k.dtype)
                log_count[b, kv, s, : len(picked)] = times.log()
    return Kept(*found, log_count)


def fed(q, k, v, real, sizes, overlap, sinks, slots, window, softcap):
    """What the fast path gives for rows that come in pieces, left-padded by `pads` zeros."""
    batch = len(real)
    rows, seen, out, lse, start = {}, None, [], [], 0
    texts = [[x[b, :, real[b]] for b in range(batch)] for x in (k, v)]
    longest = max(x.shape[1] for x in texts[0])
    whole = [
        torch.stack([torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[1])) for x in rows])
        for rows in texts
    ]
    for size in sizes:
        at = slice(start, start + size)
        keep = real[:, at]
        grid = Grid(seen, None if bool(real.all()) else keep, batch, size, N, "cpu")
        own = Pair(*(grid.place(x[:, :, at], rows.get(n)) for n, x in (("k", k), ("v", v))))
        earlier = Pair(
            *(earlier_before(rows.get(f"e{n}"), getattr(own, n), overlap, N) for n in ("k", "v"))
        )
        first = Pair(
            *(
                first_tokens(x[:, :, at], rows.get(f"s{n}"), sinks, grid)
                for n, x in (("k", k), ("v", v))
            )
        )
        heads, weight = local_softmax(
            grid.place(q[:, :, at])[..., grid.queries, :], own, grid, scaling=SCALING,
            earlier=earlier, sinks=first, kept=kept(grid, *whole, overlap, sinks, slots),
            window=window, softcap=softcap,
        )  # fmt: skip
        out.append(grid.take(heads))
        lse.append(grid.take(weight[..., None])[..., 0])
        for n in ("k", "v"):
            placed = getattr(own, n)
            rows[n], rows[f"s{n}"] = grid.rest(placed), getattr(first, n)
            rows[f"e{n}"] = earlier_after(getattr(earlier, n), placed, grid)
        seen = grid.new if seen is None else seen + grid.new
        start += size
    return torch.cat(out, 2), torch.cat(lse, 2)


CASES = {
    "own": (0, 0, 0, None, None),
    "overlap": (1, 0, 0, None, None),
    "two before": (2, 0, 0, None, None),
    "sinks": (1, 3, 0, None, None),
    "sinks over a segment": (1, 6, 0, None, None),
    "kept": (1, 1, 5, None, None),
    "kept, no overlap": (0, 2, 3, None, None),
    "window": (2, 1, 4, 6, None),
    "softcap": (1, 2, 4, None, 1.5),
}


@pytest.mark.parametrize("sizes", [[23], [1] * 23, [5, 4, 1, 13], [8, 12, 3]], ids=str)
@pytest.mark.parametrize("pads", [(0, 0), (3, 9)], ids=["alike", "padded"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_one_softmax_over_what_a_query_reads(case, pads, sizes):
    real = torch.arange(23) >= torch.tensor(pads)[:, None]
    got, lse = fed(*inputs(), real, sizes, *case)
    for row, keep in enumerate(real):
        heads, weights = wanted(row, pads[row], case)
        torch.testing.assert_close(got[row, :, keep], heads, atol=1e-12, rtol=0)
        torch.testing.assert_close(lse[row, :, keep], weights, atol=1e-12, rtol=0)


def test_gradients_are_those_of_the_definition():
    grid = Grid(None, None, 1, 2 * N, N, "cpu")
    given = [
        made(1, heads, 2, N, D, seed=s).requires_grad_() for s, heads in enumerate((H, KV, KV))
    ]
    before = [made(1, KV, 1, N, D, seed=7 + s).requires_grad_() for s in range(2)]
    log_count = torch.tensor([0.7, -torch.inf], dtype=torch.float64).expand(1, KV, 2, 2)
    more = [made(1, KV, 2, 2, D, seed=9 + s).requires_grad_() for s in range(2)]

    def run(q, k, v, ek, ev, kk, kv):
        return local_softmax(
            q, Pair(k, v), grid, scaling=SCALING, earlier=Pair(ek, ev),
            kept=Kept(kk, kv, log_count), softcap=2.0,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (*given, *before, *more))


def test_half_precision_is_summed_in_float32():
    grid = Grid(None, None, 1, 2 * N, N, "cpu")
    q, k, v = (made(1, h, 2, N, D, seed=s).bfloat16() for s, h in enumerate((H, KV, KV)))
    out, lse = local_softmax(q, Pair(k, v), grid, scaling=SCALING)
    wanted = local_softmax(q.float(), Pair(k.float(), v.float()), grid, scaling=SCALING)
    assert out.dtype == lse.dtype == torch.float32
    assert torch.equal(out, wanted[0])
