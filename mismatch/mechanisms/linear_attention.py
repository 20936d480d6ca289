"""linear_attention: a running sum of phi(k) v^T in place of the softmax; with a window, LoLCATs' hybrid.

Per query head, phi a feature map (`feature_maps.py`), q and k after the rotary embedding, n the query:

    near(n) = { j <= n : n - j < window or j < sinks }          far(n) = the other j <= n

              mu sum_near exp(s_nj - c_n) v_j + sum_far g^(age) phi(q_n).phi(k_j) v_j
    y_n   =   -----------------------------------------------------------------------
              mu sum_near exp(s_nj - c_n)     + sum_far g^(age) phi(q_n).phi(k_j)

    s_nj  = the module's logits: scaling q_n.k_j, with its softcap (phi sees neither)
    c_n   = max of s_nj over near(n);   mu = sigmoid(mix)       mix: one number per query head
    age   = n - window - j, how long ago j left the window;  g = sigmoid(decay): one per kv head

window=0, sinks=0 is linear attention, phi(q_n) S_n / phi(q_n) z_n with S and z the sums of g^(n-j) phi(k_j) v_j^T and
of g^(n-j) phi(k_j) (arXiv 2006.16236, eq. 8-12). window > 0 is the hybrid of LoLCATs (arXiv 2410.10254, and
`hybrid_attention_quadratic` of its code): softmax over the last `window` tokens, linear over everything older, one
denominator for both, mu on the softmax alone (0.1 at first, as in its runs). c_n is part of the function: the best near
token weighs mu, whatever its logit, so a map with bounded features (exp, softmax, hedgehog) keeps far and near
comparable, and elu, relu and learned let the sum drown the window. The far sum is computed in chunks of 64 tokens with
a state between them, in time and memory linear in the length.

As decided here:

    codebook     not in the papers. `codes` keys c_m of each kv head stand for all far ones (`parts/codebook.py`):

                     near = mu sum_near exp(s_nj)
                     far  = (1 - mu) sum_far g^(age) sum_m exp(cap(scaling q_n.c_m)) phi_m(k_j)

                 on one scale, so without c_n, and mu is 1/2 at first; q_n and k_j of the far sum are not rotated. Codes
                 are k-means of the keys of calibration text. The repair stage `inherit` sets g, and mu such that far
                 tokens get as much attention as in the teacher
    position     queries and keys are rotated before phi, as in LoLCATs; not for codebook
    decay        learned: g starts as in RetNet, 1 - 2^(-5-h) for kv head h (arXiv 2307.08621, eq. 8), but the sum stays
                 divided by its weights (RetNet has a GroupNorm instead); only powers of g that are <= 1 are ever formed
    sinks        the first `sinks` real tokens stay in the softmax and never enter the sum (not in the papers; in layer
                 12 of SmolLM2 the lost sink is most of the damage)
    GQA          one sum, one g and one key map per kv head, one query map and one mu per query head; query head h reads
                 kv head h // (H / KV)
    own window   a module whose own window is <= `window` keeps it, and nothing is linear then. Behind a wider one the
                 sum reaches to the first token: a sum cannot drop a token. Sinks are seen from behind either
    padding      pads are no tokens: they have no age, fill no window and enter no sum
    dtype        logits, sums and the division in float32 at least
    branches     near and far; one that is switched off leaves its weight in the denominator
    slots        none: `infini` has them, and with feature_map=hedgehog, normalizer=shared is this hybrid by segments
    no weight    a query whose phi is orthogonal to all keys (relu, learned) reads 0

Limits: plain PyTorch on every device; CUDA kernels (flash-linear-attention) could not be tested, and none is called.

Inherited: every projection, bias and query/key norm. New: mix (with a window or sinks), decay (learned), the maps' W
and b (hedgehog, learned), the codes and their width (codebook). Dropped: dropout of the attention weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mismatch.errors import ConfigError
from mismatch.mechanisms.base import CALIBRATION_TOKENS, Context, tensor_kind
from mismatch.mechanisms.parts.calling import cache_in, hidden_in
from mismatch.mechanisms.parts.codebook import UNBALANCED, Codebook, InputSample, balanced, lowered
from mismatch.mechanisms.parts.feature_maps import FeatureMap
from mismatch.mechanisms.parts.initial_values import EARLY, Statistics
from mismatch.mechanisms.parts.own_state import OwnState, entry
from mismatch.mechanisms.parts.packing import PackedRows
from mismatch.mechanisms.parts.projections import AttentionParts
from mismatch.mechanisms.parts.text_by_text import text_by_text
from mismatch.mechanisms.parts.token_facts import facts_in

# A smaller weight of all keys is none; dividing by it would overflow float32 gradients.
EMPTY = 1e-20
LOLCATS = -2.2  # mix of every head before training


@dataclass(frozen=True)
class LinearAttentionConfig:
    feature_map: Literal["elu", "relu", "exp", "softmax", "hedgehog", "learned", "codebook"] = (
        "hedgehog"
    )
    """What makes queries and keys positive; hedgehog and learned have weights, codebook has k-means of the keys of
    calibration text."""
    codes: Annotated[int, ">= 1"] = 64
    """Keys by kv head that stand for all far ones; only with feature_map=codebook."""
    window: Annotated[int, ">= 0"] = 0
    """Last tokens, the query's own included, that are attended by softmax; 0 = linear attention alone."""
    sinks: Annotated[int, ">= 0"] = 0
    """First tokens of the text that stay in the softmax."""
    decay: Literal["none", "learned"] = "none"
    """Whether the sum forgets, by one factor per kv head and token."""
    mix_init: float | None = None
    """mix of every head before training; sigmoid(mix) is the weight of the softmax. none = -2.2, which is 0.1; with
    codebook 0."""


class LinearAttention(AttentionParts):
    """Linear attention, or its hybrid with a window, over the projections of the attention it replaces."""

    Config = LinearAttentionConfig
    slots = ("attn",)
    heads = True
    identity = "window >= length"
    state = (
        "per row and kv head one matrix (features x (D + 1), the last column is z) in float32, "
        "whatever the length; keys and values of the last `window` tokens and of the sinks, and with "
        "codebook the former without position, too"
    )
    source = "arXiv 2006.16236; window: arXiv 2410.10254; decay: arXiv 2307.08621; see feature_maps"
    branch_names: tuple[str, ...] = ("near", "far")

    def __init__(
        self, original: nn.Module, config: LinearAttentionConfig, context: Context
    ) -> None:
        """Raises:
        ConfigError: codes without a codebook, or more than there are different keys.
        SurgeryError: a codebook without calibration.
        """
        super().__init__(original, config, context)
        kind = tensor_kind(original, context)
        if config.feature_map != "codebook" and config.codes != LinearAttentionConfig.codes:
            raise ConfigError(
                f"`codes={config.codes}` goes with feature_map=codebook, and the map is {config.feature_map}",
                hint="leave out one of the two",
                argument="codes",
            )
        own = self.window or math.inf
        self.near: int = int(min(config.window, own))
        self.has_far = config.window < own
        self.by_codes = config.feature_map == "codebook" and self.has_far
        self.map_q: nn.Module = nn.Identity()
        if config.feature_map == "codebook":
            self.map_k: nn.Module = Codebook(self, config.codes, context)
        else:
            self.map_q = FeatureMap(config.feature_map, self.n_heads, self.head_dim, kind)
            self.map_k = FeatureMap(config.feature_map, self.n_kv_heads, self.head_dim, kind)
        if config.window or config.sinks:
            mix = (
                (0.0 if self.by_codes else LOLCATS) if config.mix_init is None else config.mix_init
            )
            self.mix = nn.Parameter(torch.full((self.n_heads,), mix, **kind))
        if not (self.has_far and (config.window or config.sinks)):
            self.branch_names = ()  # one sum alone
        if config.decay == "learned":
            logits = [math.log(2 ** (5 + h) - 1) for h in range(self.n_kv_heads)]
            self.decay = nn.Parameter(torch.tensor(logits, **kind))

    @classmethod
    def calibrator(cls, config: LinearAttentionConfig) -> InputSample | None:
        return InputSample(config.sinks) if config.feature_map == "codebook" else None

    @classmethod
    def calibration_tokens(cls, config: LinearAttentionConfig, d_model: int) -> int:
        return max(CALIBRATION_TOKENS, Codebook.tokens_each * config.codes)

    def notes(self) -> tuple[str, ...]:
        notes = [UNBALANCED] if self.by_codes and not self.context.restoring else []
        if self.window is not None:
            what = (
                "gone: the sum reaches back to the first token"
                if self.has_far
                else "kept; nothing is linear"
            )
            notes.append(f"the module's own window of {self.window} tokens is {what}")
        return tuple(notes)

    def state_bytes(self) -> int:
        kind, config = tensor_kind(self, self.context), self.settings
        tokens = (2 + self.by_codes) * self.near + 2 * config.sinks
        numbers = tokens * self.head_dim * kind["dtype"].itemsize
        if self.has_far:
            key = torch.zeros(1, self.n_kv_heads, 1, self.head_dim, device=kind["device"])
            wide = torch.promote_types(kind["dtype"], torch.float32).itemsize
            numbers += self.map_k(key).shape[-1] * (self.head_dim + 1) * wide
        return self.n_kv_heads * numbers

    def initial_values(self) -> dict[str, Callable[[Statistics], None]]:
        found: dict[str, Callable[[Statistics], None]] = {}
        if self.settings.decay == "learned":
            found["half-life"] = self._forget
        if self.by_codes and self.branch_names:
            found["gate"] = self._balance
        return found

    def _forget(self, statistics: Statistics) -> None:
        kept = 2.0 ** (-1.0 / statistics.half_life(self.n_kv_heads))
        self.decay.copy_(kept.logit())

    def _balance(self, statistics: Statistics) -> None:
        """mix such that far tokens weigh in the mean what they do in the attention (of the sinks, all but the first
        token count as far)."""
        wanted = statistics.beyond(self.settings.window, first=self.settings.sinks == 0)
        with self._silenced("near"):
            shares = [call(self._far_share, x) for x, call in statistics.runs]
        late = [share[..., share.shape[-1] // EARLY :].movedim(1, 0).flatten(1) for share in shares]
        self.mix.copy_(balanced(torch.cat(late, 1).double(), self.mix.double(), wanted))

    def _far_share(self, *args: Any, **kwargs: Any) -> Tensor:
        """What all far tokens weigh for each query of whole texts, the near branch silent: `batch H pos` in 0..1."""
        x = hidden_in(args, kwargs)
        bare_q, bare_k, v = self.qkv(x)
        q, k = self.rotate(bare_q, bare_k, kwargs.get("position_embeddings"))
        row = PackedRows(None, None, x.shape[0], x.shape[1], self.near, x.device)
        ones = torch.ones_like(v[..., :1])
        sinks = self._sinks(k, ones, row, {})
        return self._mixed(q, k, ones, (bare_q, bare_k), sinks, row, None)[0][..., 0]

    def gates(self) -> dict[str, nn.Parameter]:
        return {"near": self.mix} if self.branch_names else {}

    def restores(self) -> dict[str, AbstractContextManager[None]]:
        softmax = self.settings.window > 0 and self.settings.sinks == 0
        return {"first_token": self._with_sink()} if softmax else {}

    @contextmanager
    def _with_sink(self) -> Iterator[None]:
        before, self.settings = self.settings, replace(self.settings, sinks=1)
        try:
            yield
        finally:
            self.settings = before

    @text_by_text
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """As the attention it replaces: `batch pos d_model` in, (`batch pos d_model`, None) out."""
        x, cache = hidden_in(args, kwargs), cache_in(kwargs)
        state = OwnState() if cache is None else entry(cache, self.layer_idx, OwnState)
        keep = facts_in(args, kwargs).real(x)
        bare_q, bare_k, v = self.qkv(x)
        q, k = self.rotate(bare_q, bare_k, kwargs.get("position_embeddings"))
        batch, length = x.shape[:2]
        row = PackedRows(state.seen, keep, batch, length, self.near, x.device)
        q, k, v = (row.pack(part) for part in (q, k, v))
        sinks = self._sinks(k, v, row, state.rows)
        new = {"near_k": k, "near_v": v}
        if self.by_codes:
            new["near_bare"] = row.pack(bare_k)
        near = {name: row.behind(part, name, state.rows) for name, part in new.items()}
        k, v = near["near_k"], near["near_v"]
        far = (row.pack(bare_q), near["near_bare"]) if self.by_codes else (q, k)
        with torch.autocast(x.device.type, enabled=False):
            heads, memory = self._mixed(q, k, v, far, sinks, row, state.rows.get("memory"))
        if cache is not None:
            held = {name: row.last(part) for name, part in near.items()} if self.near else {}
            state.advance(row.new, x.shape[1], held | sinks | memory)
        return self.project(row.unpack(heads).to(x.dtype), x), None

    def _mixed(
        self, q: Tensor, k: Tensor, v: Tensor, far: tuple[Tensor, Tensor], sinks: dict[str, Tensor],
        row: PackedRows, memory: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Both sums and their quotient.

        Args:
            q: `batch H pos D`, packed.
            k, v: `batch KV held+pos D`, packed behind what the window holds.
            far: q and k of the far sum.
            sinks: from `_sinks`.
            memory: S and z before this call, `batch KV features D+1`.

        Returns:
            `batch H pos D` in float32 at least, and the memory after this call by its name.
        """
        wide = torch.promote_types(v.dtype, torch.float32)
        q, k, v, far_q, far_k = (part.to(wide) for part in (q, k, v, *far))
        sums: list[Tensor] = []
        after: dict[str, Tensor] = {}
        near = self._near(q, k, v, sinks, row) if self.near or sinks else None
        if self.has_far:
            phi_k = self.map_k(row.leaving(far_k))
            if memory is None:
                memory = k.new_zeros(*k.shape[:2], phi_k.shape[-1], v.shape[-1] + 1)
            if isinstance(self.map_k, Codebook):
                queries = self.map_k.logits(far_q, self.scaling, self.softcap)
            else:
                queries = self.map_q(far_q)
            most = None if near is None else near[1]
            total, memory, top = self._far(queries, phi_k, row.leaving(v), row, memory, most)
            after = {"memory": memory}
            if near is not None and top is not None:
                near = near[0] * (near[1] - top).exp(), top
                total = (1 - self._share(wide)) * total
            sums.append(self._unless_silent(total, "far"))
        if near is not None:
            sums.append(self._share(wide) * self._unless_silent(near[0], "near"))
        total = sums[0] if len(sums) == 1 else sums[0] + sums[1]
        weight = total[..., -1:]
        # Filled in BEFORE the division: a `where` around 0 / 0 hides the NaN of the value and not
        # that of its gradient.
        heads = total[..., :-1] / weight.masked_fill(weight < EMPTY, 1.0)
        return heads.movedim(2, 3).flatten(3, 4).flatten(1, 2)[:, :, : q.shape[2]], after

    def _share(self, dtype: torch.dtype) -> Tensor:
        """mu, `KV 1 group 1 1`."""
        return torch.sigmoid(self.mix.to(dtype)).view(self.n_kv_heads, 1, self.group, 1, 1)

    def _unless_silent(self, total: Tensor, branch: str) -> Tensor:
        """A sum with its weight; of a branch that is switched off the weight alone."""
        if branch not in self.silent:
            return total
        return torch.cat([torch.zeros_like(total[..., :-1]), total[..., -1:]], dim=-1)

    def _far(
        self, queries: Tensor, phi_k: Tensor, v: Tensor, row: PackedRows, memory: Tensor,
        most: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """The far sum, chunk by chunk.

        Args:
            queries: phi of them, or with a codebook its logarithm, `batch H pos features`.
            phi_k, v: of the token that leaves the window at each query, `batch KV pos ...`.
            row: which of those exist.
            memory: before the first, `batch KV features D+1`.
            most: c_n, from `_near`.

        Returns:
            sum and weight, `batch KV chunks group C D+1`, and the memory after the last token; with a codebook the
            logarithm of what sum and weight are divided by, as c_n, else None.
        """
        leaves, age = row.clock(self.settings.sinks)
        phi_k = row.chunks(phi_k).masked_fill(~leaves[:, None, ..., None], 0)
        pairs = row.chunks(v)
        pairs = torch.cat([pairs, torch.ones_like(pairs[..., :1])], dim=-1)
        phi_q, top = self._grouped(queries, row), None
        start = F.pad(age[:, :-1, -1], (1, 0))[..., None]  # of each chunk: the age before it
        end = age[..., -1:]
        # batch or 1, KV, chunks, queries, keys
        fade = self._power(age[..., :, None] - age[..., None, :], memory.dtype).tril()
        added = (phi_k * self._power(end - age, memory.dtype)[..., None]).transpose(-1, -2) @ pairs
        kept = self._power(end - start, memory.dtype)[..., None]
        before = []
        for i in range(added.shape[2]):
            before.append(memory)
            memory = kept[:, :, i] * memory + added[:, :, i]
        earlier, faded = torch.stack(before, dim=2), self._power(age - start, memory.dtype)
        if self.by_codes:
            seen = faded[..., None] * earlier[..., None, :, -1] + fade @ phi_k
            phi_q, top = lowered(phi_q, seen, most)
        weights = (phi_q @ phi_k.transpose(-1, -2)).unflatten(3, (self.group, -1))
        inside = ((weights * fade[:, :, :, None]).flatten(3, 4) @ pairs).unflatten(
            3, (self.group, -1)
        )
        carried = (phi_q @ earlier).unflatten(3, (self.group, -1)) * faded[:, :, :, None, :, None]
        return carried + inside, memory, top

    def _power(self, age: Tensor, dtype: torch.dtype) -> Tensor:
        """g^age, `batch or 1, ...` -> `batch or 1, KV, ...`; 1 without decay. Negative ages, which
        no one may read, count as 0: g^-1000 would overflow."""
        age = age.clamp(min=0).to(dtype)[:, None]
        if self.settings.decay == "none":
            return torch.ones_like(age)
        rate = F.logsigmoid(self.decay.to(dtype))
        return (age * rate.view(-1, *[1] * (age.ndim - 2))).exp()

    def _near(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: dict[str, Tensor], row: PackedRows
    ) -> tuple[Tensor, Tensor]:
        """The softmax branch without its division: sum and weight, `batch KV chunks group C D+1`, and c_n, `... 1`."""
        keys, values, allowed = row.windows(k), row.windows(v), row.window_mask()
        if sinks:
            first_k, first_v = (row.for_each_chunk(sinks[name]) for name in ("sink_k", "sink_v"))
            keys = torch.cat([first_k.to(keys.dtype), keys], dim=3)
            values = torch.cat([first_v.to(values.dtype), values], dim=3)
            allowed = torch.cat([row.sink_mask(self.settings.sinks), allowed], dim=-1)
        logits = self._grouped(q, row) @ keys.transpose(-1, -2) * self.scaling
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        # Masked before `exp`: what overflows there has a NaN gradient, masked or not. No row is
        # empty: a window holds the query itself, and the first sink is seen by all.
        logits = logits.unflatten(3, (self.group, -1)).masked_fill(
            ~allowed[:, None, :, None], torch.finfo(logits.dtype).min
        )
        most = logits.amax(-1, keepdim=True)
        weights = (logits - most).exp()
        sums = (weights.flatten(3, 4) @ values).unflatten(3, (self.group, -1))
        return torch.cat([sums, weights.sum(-1, keepdim=True)], dim=-1), most

    def _grouped(self, x: Tensor, row: PackedRows) -> Tensor:
        """Query heads beside their kv head: `batch H pos any` -> `batch KV chunks group*C any`."""
        chunks = row.chunks(x).unflatten(1, (self.n_kv_heads, self.group))
        return chunks.movedim(3, 2).flatten(3, 4)

    def _sinks(
        self, k: Tensor, v: Tensor, row: PackedRows, rows: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Keys and values of the first `sinks` real tokens, `batch KV sinks D`; empty where there
        are none."""
        if self.settings.sinks == 0:
            return {}
        return {
            name: row.first(x, rows.get(name), self.settings.sinks)
            for name, x in (("sink_k", k), ("sink_v", v))
        }
