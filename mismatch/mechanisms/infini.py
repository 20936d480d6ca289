"""infini: segment-local attention plus a compressive memory of all earlier segments.

Source: arXiv 2404.07143v2 (Munkhdalai, Faruqui, Gopal), section 2.1 to 2.3. For segment s of N
tokens, per head, sigma = ELU + 1 element-wise:

    A_dot = softmax(scaling Q K^T) V         causal, inside the segment                   (eq. 6)
    A_mem = sigma(Q) M / (sigma(Q) z)        the memory BEFORE this segment               (eq. 7)
    M <- M + sigma(K)^T V                    update=linear                                (eq. 8)
    M <- M + sigma(K)^T (V - sigma(K) M / (sigma(K) z))      update=delta                 (eq. 9)
    z <- z + sum_t sigma(K_t)                under both rules
    A = sigmoid(gate) A_mem + (1 - sigmoid(gate)) A_dot      one gate per query head      (eq. 10)

The memory is read, then written, once per segment, with queries and keys that carry no position;
A_dot has the model's own rotary embedding, scaling, softcap and sliding window (the paper prints
softmax(QK^T / sqrt(d_model)); a swap must keep what the module was trained with). Gradients flow
through the memory into all earlier segments.

What the paper leaves open, as decided here:

    empty memory  M = z = 0 reads as 0. first_segment=blend is the paper's text: the first segment's
                  output is (1 - sigmoid(gate)) A_dot, half of it at gate 0. first_segment=local
                  leaves it whole: no gate while z = 0
    GQA           one memory per kv head; query head h reads that of kv head h // (H / KV), as in
                  the softmax
    padding       segments count from the first real token of a row; pads are not written, read or
                  attended
    last segment  an incomplete segment is attended and is not yet in the memory
    dtype         M, z and the blend in float32 at least (z overflows float16 after 4,000 tokens)

Not in the paper, and off by default (analyses/infini_options.py: what they are worth at one layer):

    sinks         the first `sinks` real tokens stay visible to the softmax of every later segment
                  (in layer 12 of SmolLM2 the lost sink is most of the damage)
    overlap       A_dot reads the `overlap` segments before its own too. A segment enters the memory
                  when the softmax has left it behind
    feature_map   softmax([x, -x]) over 2 D features; learned: softmax([Wx, -Wx]), W a D x D matrix
                  per query head for queries and per kv head for keys, identity at first (Hedgehog,
                  arXiv 2402.04347); hedgehog: the same over queries and keys of the memory's own,
                  q + C_q h and k + C_k h, h the hidden states that enter the layer, C 0 at first
    normalizer    shared: one denominator for both reads, so that a memory with small weights is
                  not read,

                      A = (sum_j exp(s_j) v_j + c sigma(Q) M) / (sum_j exp(s_j) + c sigma(Q) z)

                  s_j the scores of A_dot, log c = gate + gate_x h, one number per query head and
                  token, gate_x 0 at first. While the memory is empty A = A_dot. Sinks are not
                  written to the memory: under one denominator they would count twice
    slots         exact keys and values of the far tokens of highest score stand in the softmax of
                  A_dot, by kv head (`parts/slots.py`). The memory holds these tokens all the same
    slot_score    recall_error: || v - sigma(k) M / (sigma(k) z) ||, the memory as it is before the
                  token's segment is written: what it cannot say of a token yet (the self-recall
                  error of LoLA, arXiv 2505.23666, which takes such tokens out of the memory)
    memory_       far: the memory's queries are turned by the rotation of (overlap + 1) segments, by
    position      this layer's own frequencies: every key of the memory is read as at that distance

Inherited: every projection, bias and query/key norm. New: H gates (and gate_x, the learned maps,
C_q and C_k, the net of learned scores). Dropped: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mismatch.errors import ConfigError
from mismatch.mechanisms.base import Context, tensor_kind
from mismatch.mechanisms.parts.calling import cache_in, hidden_in
from mismatch.mechanisms.parts.choosing import Choosing
from mismatch.mechanisms.parts.compressive import (
    delta,
    joint_share,
    linear,
    not_written,
    retrieve,
    weigh,
)
from mismatch.mechanisms.parts.feature_maps import elu_plus_one, signed_softmax
from mismatch.mechanisms.parts.local_softmax import (
    Kept,
    Pair,
    earlier_after,
    earlier_before,
    first_tokens,
    local_softmax,
)
from mismatch.mechanisms.parts.own_state import OwnState, entry
from mismatch.mechanisms.parts.rotary import FixedTurn, need_rotary
from mismatch.mechanisms.parts.segment_attention import segment_attention
from mismatch.mechanisms.parts.segments import Grid
from mismatch.mechanisms.parts.slots import UNTRAINED, Slots, per_kv_head, rounded
from mismatch.mechanisms.parts.text_by_text import text_by_text
from mismatch.mechanisms.parts.token_facts import facts_in


@dataclass(frozen=True)
class InfiniConfig:
    segment: Annotated[int, ">= 1"] = 256
    """Tokens per segment. A text that fits into one never reads the memory."""
    update: Literal["linear", "delta"] = "linear"
    """How a segment is written: added (eq. 8), or added minus what its keys already return (eq.
    9)."""
    gate_init: float = 0.0
    """Gate of every head before training; sigmoid(gate) is the share of the memory, or under
    normalizer=shared exp(gate) the weight of its keys."""
    feature_map: Literal["elu", "softmax", "learned", "hedgehog"] = "elu"
    """What makes queries and keys positive for the memory; hedgehog has queries and keys of its
    own."""
    sinks: Annotated[int, ">= 0"] = 0
    """First tokens of the text that every later segment still attends to."""
    first_segment: Literal["blend", "local"] = "blend"
    """While the memory is empty: blend it all the same (the paper), or take local attention
    alone."""
    overlap: Annotated[int, ">= 0"] = 0
    """Segments before its own that local attention reads too; the memory holds what is older."""
    normalizer: Literal["gate", "shared"] = "gate"
    """How both reads are joined: by the gate (eq. 10), or as one sum under one denominator."""
    slots: Annotated[int | tuple[int, ...], ">= 0"] = 0
    """Far tokens whose exact keys and values a kv head keeps: one number for all heads, or one for each."""
    slot_score: Literal[
        "learned",
        "recall_error",
        "value_norm",
        "key_norm",
        "short_key",
        "recent",
        "random",
        "first",
    ] = "learned"
    """What is worth keeping: a trained net, what the memory recalls badly, or a control of the choice."""
    memory_position: Literal["none", "far"] = "none"
    """Queries of the memory without position (the paper), or turned as for keys overlap + 1
    segments away."""


class Infini(Choosing):
    """Infini-attention over the projections of the attention it replaces."""

    Config = InfiniConfig
    slots = ("attn",)
    heads = True
    identity = (
        "(overlap + 1) segment >= length, and gate_init -> -inf, first_segment=local or "
        "normalizer=shared"
    )
    state = (
        "per row and kv head one matrix (features x D) and one vector (features) in float32, "
        "whatever the length; keys, values and keys without position of at most segment - 1 "
        "tokens, and of `overlap` segments; keys and values of the sinks and slots, and scores"
    )
    source = "arXiv 2404.07143v2, section 2, eq. 6-10; hedgehog: arXiv 2402.04347"
    branch_names = ("memory", "local")

    def __init__(self, original: nn.Module, config: InfiniConfig, context: Context) -> None:
        """Raises:
        SurgeryError: memory_position=far where nothing is rotated.
        ConfigError: a list of slots that has not one number per kv head; a score without slots.
        """
        super().__init__(original, config, context)
        kind = tensor_kind(original, context)
        self.gate = nn.Parameter(torch.full((self.n_heads,), config.gate_init, **kind))
        self.shared = config.normalizer == "shared"
        if self.shared:
            self.gate_x = nn.Parameter(torch.zeros(self.n_heads, context.d_model, **kind))
        if config.feature_map in ("learned", "hedgehog"):
            eye = torch.eye(self.head_dim, **kind)
            self.map_q = nn.Parameter(eye.repeat(self.n_heads, 1, 1))
            self.map_k = nn.Parameter(eye.repeat(self.n_kv_heads, 1, 1))
        if config.feature_map == "hedgehog":
            sizes = [heads * self.head_dim for heads in (self.n_heads, self.n_kv_heads)]
            self.own_q, self.own_k = (
                nn.Parameter(torch.zeros(size, context.d_model, **kind)) for size in sizes
            )
        # Maps of its own under one denominator can give what the softmax gave of far tokens.
        self.new_first = self.shared and config.feature_map == "hedgehog"
        if config.memory_position == "far":
            need_rotary(original, context, "turn the memory's queries with (memory_position=far)")
            distance = (config.overlap + 1) * config.segment
            self.turn = FixedTurn(context, distance)
        counts = per_kv_head(config.slots, self.n_kv_heads)
        if config.slot_score != "learned" and not any(counts):
            raise ConfigError(
                f"`slot_score={config.slot_score}` chooses far tokens, and there are no slots for them",
                hint="say how many a kv head keeps: slots=96",
                argument="slot_score",
            )
        reach = {"overlap": config.overlap, "size": config.segment, "sinks": config.sinks}
        self.choice = (
            Slots(original, context, counts, config.slot_score, **reach) if any(counts) else None
        )

    def notes(self) -> tuple[str, ...]:
        config, notes = self.settings, []
        if config.first_segment == "blend" and not self.shared:
            share = torch.sigmoid(torch.tensor(-config.gate_init)).item()
            which = f"{config.overlap + 1} segments" if config.overlap else "segment"
            notes.append(
                f"first {which}: the memory is empty and the blend keeps {share:.2f} of local "
                "attention (first_segment=local keeps all of it)"
            )
        if self.window is not None and self.window < config.segment * (config.overlap + 1):
            notes.append(f"local attention keeps the module's own window of {self.window} tokens")
        if self.score_net() is not None and not self.context.restoring:
            notes.append(UNTRAINED)
        return tuple(notes)

    @text_by_text
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """As the attention it replaces: `batch pos d_model` in, (`batch pos d_model`, None) out."""
        x, cache = hidden_in(args, kwargs), cache_in(kwargs)
        state = OwnState() if cache is None else entry(cache, self.layer_idx, OwnState)
        keep = facts_in(args, kwargs).real(x)
        batch, length = x.shape[:2]
        grid = Grid(state.seen, keep, batch, length, self.settings.segment, x.device)
        q, k, v = self.qkv(x)
        rotation = kwargs.get("position_embeddings")
        q_rot, k_rot = self.rotate(q, k, rotation)
        q, k = self._addresses(x, q, k, rotation)
        opened, new = state.rows, {"k": k, "k_rot": k_rot, "v": v}
        placed = {name: grid.place(part, opened.get(f"open_{name}")) for name, part in new.items()}
        sinks = self._sinks(k_rot, v, grid, opened)
        config, earlier = self.settings, {}
        if config.overlap or self.choice is not None:
            earlier = {
                name: earlier_before(
                    opened.get(f"earlier_{name}"), part, config.overlap, config.segment
                )
                for name, part in placed.items()
            }
        with torch.autocast(x.device.type, enabled=False):
            read, weight, memory, missed = self._memory(
                grid.place(q)[..., grid.queries, :], placed, earlier, grid, opened
            )
        own, kept = Pair(placed["k_rot"], placed["v"]), None
        held: dict[str, Tensor] = {}
        if self.choice is not None:
            late = missed is not None
            scores = self.choice.scores(x, k_rot, v, grid) if missed is None else missed
            before = Pair(earlier["k_rot"], earlier["v"])
            kept, held = self.choice.choose(own, before, scores, grid, opened, late=late)
        local, lse = self._local(
            grid.place(q_rot)[..., grid.queries, :], own, earlier, sinks, kept, grid
        )
        with torch.autocast(x.device.type, enabled=False):
            heads = self._blend(self._share(read.dtype, x, weight, lse, grid), read, local)
        if cache is not None:
            rows = {f"open_{name}": grid.rest(part) for name, part in placed.items()}
            for name, part in earlier.items():
                rows[f"earlier_{name}"] = earlier_after(part, placed[name], grid)
            if sinks is not None:
                rows |= {"sink_k": sinks.k, "sink_v": sinks.v}
            state.advance(grid.new, x.shape[1], rows | memory | held)
        return self.project(grid.take(heads.to(x.dtype)), x), None

    def _addresses(self, x: Tensor, q: Tensor, k: Tensor, rotation: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys of the memory, `batch H pos D` and `batch KV pos D`, of those without
        position."""
        if self.settings.feature_map == "hedgehog":
            q = q + F.linear(x, self.own_q).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            k = k + F.linear(x, self.own_k).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if self.settings.memory_position == "far":
            q = self.rotate(q, k[:, :1, :1], self.turn(rotation[0]))[0]
        return q, k

    def _local(
        self,
        q: Tensor,
        own: Pair,
        earlier: dict[str, Tensor],
        sinks: Pair | None,
        kept: Kept | None,
        grid: Grid,
    ) -> tuple[Tensor, Tensor | None]:
        """A_dot, `batch H S queries D`; and, where it is more than the paper's, the logarithm of its
        denominator, `batch H S queries`."""
        if not (self.shared or earlier):
            return segment_attention(self, q, own, sinks, grid), None
        with torch.autocast(q.device.type, enabled=False):
            return local_softmax(
                q,
                own,
                grid,
                scaling=self.scaling,
                earlier=Pair(earlier["k_rot"], earlier["v"]) if earlier else None,
                sinks=sinks,
                kept=kept,
                softcap=self.softcap,
                window=self.window,
                dropout=self._dropout if self.training else 0.0,
            )

    def _sinks(self, k: Tensor, v: Tensor, grid: Grid, rows: dict[str, Tensor]) -> Pair | None:
        """Keys (rotated) and values of the first `sinks` real tokens, `batch KV sinks D`; None
        where there are none."""
        count = self.settings.sinks
        if not count:
            return None
        named = (("sink_k", k), ("sink_v", v))
        return Pair(*(first_tokens(x, rows.get(name), count, grid) for name, x in named))

    def _memory(
        self,
        q: Tensor,
        placed: dict[str, Tensor],
        earlier: dict[str, Tensor],
        grid: Grid,
        rows: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor], Tensor | None]:
        """A_mem, `batch H S queries D`; sigma(Q) z under the shared denominator, `batch H S
        queries`; the memory after what each row has left behind; and how badly it recalled the
        tokens that are written now, `batch KV closed N`, where that is their score."""
        k, v, closed = placed["k"], placed["v"], grid.closed
        if earlier and closed:  # segments on the grid push those before them into the memory
            k, v = (
                torch.cat([earlier[name], x[:, :, :closed]], 2) for name, x in (("k", k), ("v", v))
            )
        elif earlier:
            k, v = earlier["k"], earlier["v"]
        wide = torch.promote_types(v.dtype, torch.float32)
        phi_k = self._positive(k[:, :, :closed].to(wide), "map_k")
        skipped = self.settings.sinks if self.shared else 0
        if closed and (skipped or earlier):
            left_out = not_written(grid, self.settings.overlap, skipped, v.device)
            phi_k = phi_k.masked_fill(left_out[:, None, ..., None], 0.0)
        phi_q = self._positive(q.to(wide), "map_q").unflatten(1, (self.n_kv_heads, self.group))
        memory, norm = rows.get("memory"), rows.get("norm")
        if memory is None or norm is None:
            memory = v.new_zeros(*v.shape[:2], phi_q.shape[-1], v.shape[-1], dtype=wide)
            norm = memory[..., 0]
        write = linear if self.settings.update == "linear" else delta
        v = v[:, :, :closed].to(wide)
        memories, norms = write(phi_k, v, memory, norm)
        before, counted = memories[:, :, None, : grid.count], norms[:, :, None, : grid.count]
        read = retrieve(phi_q, before, counted).flatten(1, 2)
        weight = weigh(phi_q, counted).flatten(1, 2) if self.shared else None
        missed = None
        if self.choice is not None and self.choice.score == "recall_error":
            with torch.no_grad():
                recalled = retrieve(phi_k, memories[:, :, :closed], norms[:, :, :closed])
                missed = rounded((v - recalled).norm(dim=-1))
        return read, weight, {"memory": grid.after(memories), "norm": grid.after(norms)}, missed

    def _positive(self, x: Tensor, learned: str) -> Tensor:
        """sigma(x): `batch heads S pos D` -> `batch heads S pos features`, all > 0."""
        if self.settings.feature_map == "elu":
            return elu_plus_one(x)
        if self.settings.feature_map in ("learned", "hedgehog"):
            x = torch.einsum("bhsnd,hed->bhsne", x, getattr(self, learned).to(x.dtype))
        return signed_softmax(x)

    def _share(
        self,
        wide: torch.dtype,
        x: Tensor,
        weight: Tensor | None,
        lse: Tensor | None,
        grid: Grid,
    ) -> Tensor:
        """The share of the memory, `batch or 1, H, S or 1, queries or 1, 1`."""
        if weight is None or lse is None or not self.shared:
            share = torch.sigmoid(self.gate.to(wide))[None, :, None, None, None]
            if self.settings.first_segment == "local":
                empty = self.settings.overlap * self.settings.segment
                share = share * (grid.starts(x.device) > empty)[:, None, :, None, None]
            return share
        log_c = F.linear(x.to(wide), self.gate_x.to(wide), self.gate.to(wide))
        log_c = grid.place(log_c.transpose(1, 2)[..., None])[..., grid.queries, 0]
        return joint_share(weight, log_c, lse.to(wide))[..., None]

    def _blend(self, share: Tensor, read: Tensor, local: Tensor) -> Tensor:
        """Eq. 10, in the dtype of the memory: `batch H S queries D`."""
        read = torch.zeros_like(read) if "memory" in self.silent else read
        local = torch.zeros_like(local) if "local" in self.silent else local
        return share * read + (1 - share) * local.to(read.dtype)

    def state_bytes(self) -> int:
        config = self.settings
        dtype = tensor_kind(self, self.context)["dtype"]
        features = self.head_dim * (1 if config.feature_map == "elu" else 2)
        wide = torch.promote_types(dtype, torch.float32).itemsize
        tokens = 3 * ((config.overlap + 1) * config.segment - 1) + 2 * config.sinks
        each = features * (self.head_dim + 1) * wide + tokens * self.head_dim * dtype.itemsize
        held = 0 if self.choice is None else self.choice.bytes_of(self.head_dim * dtype.itemsize)
        return self.n_kv_heads * each + held

    def gates(self) -> dict[str, nn.Parameter]:
        """Under a shared denominator there is none: the share is another at every token."""
        return {} if self.shared else {"memory": self.gate}
