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
    sinks         the first `sinks` real tokens stay visible to the softmax of every later segment
                  (not in the paper; in layer 12 of SmolLM2 the lost sink is most of the damage)
    feature_map   elu (the paper); softmax([x, -x]) over 2 D features; learned: softmax([Wx, -Wx]),
                  W a D x D matrix per query head for queries and per kv head for keys, identity
                  at first (Hedgehog, arXiv 2402.04347)

Inherited: every projection, bias and query/key norm. New: H gates (and the learned maps). Dropped:
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from mismatch.mechanisms.base import Context, tensor_kind
from mismatch.mechanisms.parts.calling import cache_in, hidden_in
from mismatch.mechanisms.parts.feature_maps import elu_plus_one, signed_softmax
from mismatch.mechanisms.parts.own_state import OwnState, entry
from mismatch.mechanisms.parts.projections import AttentionParts
from mismatch.mechanisms.parts.segments import Grid
from mismatch.mechanisms.parts.text_by_text import text_by_text
from mismatch.mechanisms.parts.token_facts import facts_in

# A smaller sigma(Q) z is no memory of this query; dividing by it would overflow float32 gradients.
EMPTY = 1e-20


@dataclass(frozen=True)
class InfiniConfig:
    segment: Annotated[int, ">= 1"] = 256
    """Tokens per segment. A text that fits into one never reads the memory."""
    update: Literal["linear", "delta"] = "linear"
    """How a segment is written: added (eq. 8), or added minus what its keys already return (eq.
    9)."""
    gate_init: float = 0.0
    """Gate of every head before training; sigmoid(gate) is the share of the memory."""
    feature_map: Literal["elu", "softmax", "learned"] = "elu"
    """What makes queries and keys positive for the memory."""
    sinks: Annotated[int, ">= 0"] = 0
    """First tokens of the text that every later segment still attends to."""
    first_segment: Literal["blend", "local"] = "blend"
    """While the memory is empty: blend it all the same (the paper), or take local attention
    alone."""


class Infini(AttentionParts):
    """Infini-attention over the projections of the attention it replaces."""

    Config = InfiniConfig
    slots = ("attn",)
    identity = "segment >= length, and gate_init -> -inf or first_segment=local"
    state = (
        "per row and kv head one matrix (features x D) and one vector (features) in float32, "
        "whatever the length; keys, values and keys without position of at most segment - 1 "
        "tokens; the sinks' keys and values"
    )
    source = "arXiv 2404.07143v2, section 2, eq. 6-10"
    branch_names = ("memory", "local")

    def __init__(self, original: nn.Module, config: InfiniConfig, context: Context) -> None:
        super().__init__(original, config, context)
        kind = tensor_kind(original, context)
        self.gate = nn.Parameter(torch.full((self.n_heads,), config.gate_init, **kind))
        if config.feature_map == "learned":
            eye = torch.eye(self.head_dim, **kind)
            self.map_q = nn.Parameter(eye.repeat(self.n_heads, 1, 1))
            self.map_k = nn.Parameter(eye.repeat(self.n_kv_heads, 1, 1))

    def notes(self) -> tuple[str, ...]:
        notes = []
        if self.settings.first_segment == "blend":
            share = torch.sigmoid(torch.tensor(-self.settings.gate_init)).item()
            notes.append(
                f"first segment: the memory is empty and the blend keeps {share:.2f} of local "
                "attention (first_segment=local keeps all of it)"
            )
        if self.window is not None and self.window < self.settings.segment:
            notes.append(f"local attention keeps the module's own window of {self.window} tokens")
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
        q_rot, k_rot = self.rotate(q, k, kwargs.get("position_embeddings"))
        opened = state.rows
        k_grid = grid.place(k, opened.get("open_k"))
        k_rot_grid = grid.place(k_rot, opened.get("open_k_rot"))
        v_grid = grid.place(v, opened.get("open_v"))
        sinks = self._sinks(k_rot, v, grid, opened)
        local = self._local(
            grid.place(q_rot)[..., grid.queries, :], k_rot_grid, v_grid, sinks, grid
        )
        with torch.autocast(x.device.type, enabled=False):
            read, memory = self._memory(
                grid.place(q)[..., grid.queries, :], k_grid, v_grid, grid, opened
            )
            heads = self._blend(read, local, grid)
        if cache is not None:
            opened = {"open_k": k_grid, "open_k_rot": k_rot_grid, "open_v": v_grid}
            rows = {name: grid.rest(placed) for name, placed in opened.items()}
            state.advance(grid.new, x.shape[1], rows | memory | sinks)
        return self.project(grid.take(heads.to(x.dtype))), None

    def _local(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: dict[str, Tensor], grid: Grid
    ) -> Tensor:
        """A_dot, `batch H S queries D`: causal softmax inside each segment, sinks first."""
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        j = torch.arange(grid.width, device=q.device)
        i = j[grid.queries, None]
        mask = None
        if sinks or len(i) < grid.width or (self.window or grid.width) < grid.width:
            causal = i >= j
            if self.window is not None:
                causal = causal & (i - j < self.window)
            mask = causal[None, None]
            if sinks:
                first = torch.arange(self.settings.sinks, device=q.device)
                # A sink that stands in this very segment is seen as an ordinary token.
                earlier = first < grid.starts(q.device).flatten()[:, None]
                earlier = earlier[:, None, None].expand(-1, 1, len(i), -1)
                mask = torch.cat([earlier, mask.expand(len(earlier), -1, -1, -1)], dim=-1)
                k, v = (
                    torch.cat([sinks[name].repeat_interleave(grid.count, dim=0), x], dim=2)
                    for name, x in (("sink_k", k), ("sink_v", v))
                )
        return self.attend(q, k, v, mask).unflatten(0, (-1, grid.count)).transpose(1, 2)

    def _sinks(
        self, k: Tensor, v: Tensor, grid: Grid, rows: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Keys (rotated) and values of the first `sinks` real tokens, `batch KV sinks D`; empty
        where there are none."""
        if self.settings.sinks == 0:
            return {}
        found = {}
        for name, x in (("sink_k", k), ("sink_v", v)):
            known = rows.get(name)
            if known is None:
                known = x.new_zeros(*x.shape[:2], self.settings.sinks, x.shape[3])
            complete = int(grid.seen.min()) >= self.settings.sinks
            found[name] = known if complete else grid.scatter(known, x, grid.seen)
        return found

    def _memory(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, rows: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A_mem, `batch H S queries D`, and the memory after the last complete segment of each
        row."""
        wide = torch.promote_types(v.dtype, torch.float32)
        closed = grid.closed
        phi_k = self._positive(k[:, :, :closed].to(wide), "map_k")
        phi_q = self._positive(q.to(wide), "map_q").unflatten(1, (self.n_kv_heads, self.group))
        memory, norm = rows.get("memory"), rows.get("norm")
        if memory is None or norm is None:
            memory = v.new_zeros(*v.shape[:2], phi_q.shape[-1], v.shape[-1], dtype=wide)
            norm = memory[..., 0]
        write = linear if self.settings.update == "linear" else delta
        memories, norms = write(phi_k, v[:, :, :closed].to(wide), memory, norm)
        read = retrieve(
            phi_q, memories[:, :, None, : grid.count], norms[:, :, None, : grid.count]
        ).flatten(1, 2)
        return read, {"memory": grid.after(memories), "norm": grid.after(norms)}

    def _positive(self, x: Tensor, learned: str) -> Tensor:
        """sigma(x): `batch heads S pos D` -> `batch heads S pos features`, all > 0."""
        if self.settings.feature_map == "elu":
            return elu_plus_one(x)
        if self.settings.feature_map == "learned":
            x = torch.einsum("bhsnd,hed->bhsne", x, getattr(self, learned).to(x.dtype))
        return signed_softmax(x)

    def _blend(self, read: Tensor, local: Tensor, grid: Grid) -> Tensor:
        """Eq. 10, in the dtype of the memory: `batch H S queries D`."""
        share = torch.sigmoid(self.gate.to(read.dtype))[None, :, None, None, None]
        if self.settings.first_segment == "local":
            share = share * (grid.starts(read.device) > 0)[:, None, :, None, None]
        read = torch.zeros_like(read) if "memory" in self.silent else read
        local = torch.zeros_like(local) if "local" in self.silent else local
        return share * read + (1 - share) * local.to(read.dtype)

    def gates(self) -> dict[str, nn.Parameter]:
        return {"memory": self.gate}

    def restores(self) -> dict[str, AbstractContextManager[None]]:
        return {} if self.settings.sinks else {"first_token": self._with_sink()}

    @contextmanager
    def _with_sink(self) -> Iterator[None]:
        before, self.settings = self.settings, replace(self.settings, sinks=1)
        try:
            yield
        finally:
            self.settings = before


def retrieve(phi: Tensor, memory: Tensor, norm: Tensor) -> Tensor:
    """Eq. 7: `... pos features`, `... features D`, `... features` -> `... pos D`; 0 from an empty
    memory."""
    weight = phi @ norm.unsqueeze(-1)
    # Filled in BEFORE the division: a `where` around 0 / 0 hides the NaN of the value and not that
    # of its gradient.
    return (phi @ memory) / weight.masked_fill(weight < EMPTY, 1.0)


def linear(phi: Tensor, v: Tensor, memory: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 8 for S complete segments at once.

    Args:
        phi: sigma(K), `batch KV S N features`.
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
