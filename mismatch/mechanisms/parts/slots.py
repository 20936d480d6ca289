"""Slots: of the far tokens, exact keys and values of those with the highest scores stay, by kv head.

    far        tokens in segments that lie before those which a query reads whole, without the sinks
    kept(s)    the C far tokens of highest score before segment s; of equal scores the earlier token stays
    merge      kept(s+1) = the C best of kept(s) and the tokens of the segment that becomes far

This is learned KV-cache eviction: a small net on the hidden state says what is worth keeping (KVzap, arXiv 2601.07891),
beside local attention with sinks (DuoAttention, arXiv 2410.10819; LoLA, arXiv 2505.23666, keeps what its linear memory
recalls badly). The score of a token depends on the token alone (`recall_error`: and on the segments before its own, as
its segment becomes far), so a text that comes in pieces keeps the same tokens as one that comes whole.

| slot_score | score of token n in kv head h |
|---|---|
| `learned` | W_2 silu(W_1 x_n + b_1) + b_2, one output a kv head; W_2 = b_2 = 0 at first |
| `value_norm`, `key_norm` | log of the length of its value or key |
| `short_key` | minus that of its key: the rule of arXiv 2406.11430, Knorm in kvpress |
| `recent` | n: the last far tokens stay |
| `first` | the same for all: the first tokens stay |
| `random` | a hash of n, the head and the seed: whatever the chunks are |
| `recall_error` | of a mechanism with a memory: how far what that recalls for its key is from its value |

Scores are computed in float32 at least and rounded to 1/1024. Equal tokens get equal hidden states in the first layer,
and the last bits of their scores depend on how many tokens were computed at once; rounded, they tie, and position
decides. Two scores that differ by less may still fall on two sides of a step. No gradient flows through a score or the
choice; keys and values of kept tokens have theirs.
"""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mismatch.errors import ConfigError
from mismatch.mechanisms.base import Context, tensor_kind
from mismatch.mechanisms.parts.linears import generator, linear
from mismatch.mechanisms.parts.local_softmax import Kept, Pair, earlier_after, earlier_before
from mismatch.mechanisms.parts.segments import Grid

HIDDEN = 64
"""Width of the net: 37 thousand weights at d_model 576."""
STEPS = 1024
"""Of a score, between two whole numbers."""
UNTRAINED = (
    "the scores are untrained and tie: the first tokens keep the slots until `mismatch repair` trains them (stage "
    "scores)"
)
SHORTEST = 1e-6  # a shorter key or value counts as this long: log 0 is no score
_32 = 0xFFFFFFFF
SLOT = ("slot_k", "slot_v", "slot_score")
"""Rows of the state."""


class ScoreNet(nn.Module):
    """The scores of `learned`: x `... d_model` -> `... KV`, float32 at least."""

    def __init__(self, original: nn.Module, context: Context, n_kv_heads: int) -> None:
        super().__init__()
        kind = tensor_kind(original, context)
        weight = torch.empty(HIDDEN, context.d_model, device="cpu")
        bound = context.d_model**-0.5  # as nn.Linear begins
        weight.uniform_(-bound, bound, generator=generator(context, "scores"))
        self.into = linear(weight, torch.zeros(HIDDEN), kind)
        self.out = linear(torch.zeros(n_kv_heads, HIDDEN), torch.zeros(n_kv_heads), kind)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        for layer in (self.into, self.out):
            x = F.linear(x, layer.weight.to(wide), layer.bias.to(wide))
            x = F.silu(x) if layer is self.into else x
        return x


def per_kv_head(slots: int | tuple[int, ...], n_kv_heads: int) -> tuple[int, ...]:
    """How many slots each kv head has.

    Raises:
        ConfigError: a list of another length.
    """
    if isinstance(slots, int):
        return (slots,) * n_kv_heads
    if len(slots) != n_kv_heads:
        raise ConfigError(
            f"`slots` has {len(slots)} numbers, and the module has {n_kv_heads} kv heads",
            hint=f"give one number for all, or {n_kv_heads}",
            argument="slots",
        )
    return tuple(slots)


class Slots(nn.Module):
    """What is kept of the far tokens, and its rows in the state of a mechanism.

    Args:
        original: the attention, for dtype and device.
        context: where.
        counts: slots of each kv head.
        score: how tokens are scored; see the table.
        overlap, size, sinks: what a query reads whole: its segment of `size` tokens, `overlap` before it, the first.
    """

    def __init__(
        self,
        original: nn.Module,
        context: Context,
        counts: tuple[int, ...],
        score: str,
        *,
        overlap: int,
        size: int,
        sinks: int,
    ) -> None:
        super().__init__()
        self.counts, self.score = counts, score
        self.overlap, self.size, self.sinks = overlap, size, sinks
        self.seed = zlib.crc32(f"{context.seed}/{context.where}/slots".encode())
        self.net = (
            ScoreNet(original, context, len(counts)) if score == "learned" and any(counts) else None
        )

    @property
    def most(self) -> int:
        return max(self.counts)

    @torch.no_grad()
    def scores(self, x: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """Of the new tokens: `batch KV pos 1` float32, ready for the grid.

        Args:
            x: what the attention is given, `batch pos d_model`.
            k, v: `batch KV pos D`.
            grid: of this call.
        """
        if self.score in ("recent", "first", "random"):
            number = grid.seen.to(x.device)[:, None] + grid.rank
            found = torch.stack([self._by_number(number, h) for h in range(len(self.counts))], 1)
            return found[..., None].float()
        with torch.autocast(x.device.type, enabled=False):
            if self.net is not None:
                score = self.net(x).transpose(1, 2)
            else:
                side = v if self.score == "value_norm" else k
                wide = torch.promote_types(side.dtype, torch.float32)
                score = side.to(wide).norm(dim=-1).clamp(min=SHORTEST).log()
                score = -score if self.score == "short_key" else score
            return rounded(score)[..., None]

    def _by_number(self, number: Tensor, head: int) -> Tensor:
        if self.score == "first":
            return torch.zeros_like(number)
        if self.score == "recent":
            return number
        # The finaliser of MurmurHash3; 24 bits are exact in float32.
        h = (number + (self.seed + 0x9E3779B9 * (head + 1))) & _32
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            h = ((h ^ (h >> shift)) * factor) & _32
        return h >> 8

    def choose(
        self,
        own: Pair,
        earlier: Pair,
        scores: Tensor,
        grid: Grid,
        rows: dict[str, Tensor],
        *,
        late: bool = False,
    ) -> tuple[Kept | None, dict[str, Tensor]]:
        """What each segment of the grid has kept, and the rows for the next call.

        Args:
            own: on the grid, `batch KV S width D`.
            earlier: before it, `batch KV overlap N D`.
            scores: from `scores`; late: of the segments that become far now, `batch KV closed N`.
            grid: where the tokens stand.
            rows: of the state before this call.
        """
        if not self.most:
            return None, {}
        waiting: dict[str, Tensor] = {}
        if not late:
            placed = grid.place(scores, rows.get("open_score"))
            before = earlier_before(rows.get("earlier_score"), placed, self.overlap, self.size)
            waiting = {
                "open_score": grid.rest(placed),
                "earlier_score": earlier_after(before, placed, grid),
            }
            scores = torch.cat([before, placed], dim=2)[..., 0] if grid.closed else placed[..., 0]
        k, v, score = self._held(own, rows)
        # No more tokens than these are far for any query of this call.
        far = int(grid.start.max()) + (grid.count - 1 - self.overlap) * self.size - self.sinks
        columns = max(0, min(self.most, far))
        if grid.closed == 0:  # nothing becomes far: the common case of one more token
            kept_k, kept_v, valid = (x[:, :, None] for x in (k, v, score))
            last = [k, v, score[..., None]]
        else:
            # Where a kept key stands: the slots of before, then the segments before the grid, then the grid.
            chosen, at = self._merged(score, scores, grid)
            sources = [
                torch.cat([old, early.flatten(2, 3), new.flatten(2, 3)], dim=2)
                for old, early, new in zip((k, v), earlier, own, strict=True)
            ]
            here = at[:, :, : grid.count, :columns]
            kept_k, kept_v = (_picked(source, here) for source in sources)
            valid, now = chosen[:, :, : grid.count], grid.after(at)
            last = [*(_picked(x, now) for x in sources), grid.after(chosen)[..., None]]
        log_count = torch.where(valid[..., :columns] > -torch.inf, 0.0, -torch.inf)
        kept = Kept(kept_k[..., :columns, :], kept_v[..., :columns, :], log_count)
        if grid.closed == 0 and SLOT[0] in rows:
            return kept, {name: rows[name] for name in SLOT} | waiting
        slot_k, slot_v, slot_score = map(self._tight, last)
        return kept, dict(zip(SLOT, (slot_k, slot_v, slot_score[..., 0]), strict=True)) | waiting

    def _merged(self, score: Tensor, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Scores of what is kept before segment 0 .. closed, and which it is: `batch KV closed+1 most` each, the best
        first, -inf where a slot is empty.

        Args:
            score: of the slots before the grid, `batch KV most`.
            tokens: scores of the segments that become far, `batch KV closed N`, or of more behind them.
        """
        number = torch.arange(self.most, device=score.device)
        allowed = number < torch.tensor(self.counts, device=score.device)[:, None]
        at = number.expand_as(score)
        scores, places = [score], [at]
        step = torch.arange(tokens.shape[-1], device=score.device)
        first = (grid.start - self.overlap * self.size).to(score.device)
        for s in range(grid.closed):
            is_sink = (first + s * self.size)[:, None] + step < self.sinks  # or has not come
            leaving = tokens[:, :, s].masked_fill(is_sink[:, None], -torch.inf)
            score = torch.cat([score, leaving], dim=-1)
            place = (self.most + s * self.size + step).expand_as(leaving)
            at = torch.cat([at, place], dim=-1)
            score, order = score.sort(dim=-1, descending=True, stable=True)
            at = at.gather(-1, order)[..., : self.most]
            score = score[..., : self.most].masked_fill(~allowed, -torch.inf)
            scores.append(score)
            places.append(at)
        return torch.stack(scores, dim=2), torch.stack(places, dim=2)

    def _held(self, own: Pair, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and scores of the slots before this call, every kv head with as many columns: `batch KV most D`,
        twice, and `batch KV most`."""
        if SLOT[0] not in rows:
            batch, heads, _, _, d = own.k.shape
            k, v = (x.new_zeros(batch, heads, self.most, d) for x in own)
            return k, v, own.k.new_full((batch, heads, self.most), -torch.inf, dtype=torch.float32)
        k, v, score = (rows[name] for name in SLOT)
        return (
            self._wide(k, 0.0),
            self._wide(v, 0.0),
            self._wide(score[..., None], -torch.inf)[..., 0],
        )

    def _wide(self, tight: Tensor, empty: float) -> Tensor:
        """`batch sum(counts) D` -> `batch KV most D`."""
        heads = tight.split(self.counts, dim=1)
        padded = [F.pad(x, (0, 0, 0, self.most - x.shape[1]), value=empty) for x in heads]
        return torch.stack(padded, dim=1)

    def _tight(self, padded: Tensor) -> Tensor:
        """The way back: a kv head holds what it has."""
        return torch.cat([padded[:, h, :count] for h, count in enumerate(self.counts)], dim=1)

    def bytes_of(self, vector: int) -> int:
        """Bytes of one row's slots, whose keys and values have `vector` bytes each, and of all scores, with a full open
        segment."""
        if not self.most:
            return 0
        near = 0 if self.score == "recall_error" else (self.overlap + 1) * self.size - 1
        score = torch.float32.itemsize
        return sum(self.counts) * (2 * vector + score) + near * len(self.counts) * score


def rounded(score: Tensor) -> Tensor:
    """Scores as they are compared, float32."""
    return ((score * STEPS).round() / STEPS).float()


def _picked(source: Tensor, at: Tensor) -> Tensor:
    """`batch KV columns D` at int64 `batch KV ... C`: `batch KV ... C D`."""
    index = at.flatten(2)[..., None].expand(-1, -1, -1, source.shape[-1])
    return source.gather(2, index).unflatten(2, at.shape[2:])
