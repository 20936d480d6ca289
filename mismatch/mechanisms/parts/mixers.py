"""The recurrent mixers of transformers in place of an attention: called as one, with state in one cache entry.

`MambaMixer`, `Mamba2Mixer`, `Qwen3NextGatedDeltaNet` and `Lfm2ShortConv` are used as they are: their parameters and
initial values, convolution, scan, norm and gate. What they lack is done here, for all of them:

    call      as the attention was called, tuple back; the cache entry holds `conv` and `recurrent`
    padding   rows with equally many real tokens run together, and pads never reach the mixer. Its own mask zeroes what
              goes in; a pad would still decay the state and push a zero into the convolution's
    cache     plain tensors, never changed in place. transformers' linear layers report no length, and a cache of
              nothing else has no positions
    device    transformers takes the kernels of fla, mamba_ssm and causal_conv1d wherever they can be imported; on a
              CPU they raise. There its own torch code is called
    weights   init=inherit passes the mixer its columns (what its input projection would have made) and takes its heads
              before the output projection: both projections stay the attention's own parameters

Not run on a GPU so far. One token with a cache cannot be trained through: the library's step writes into its state
(backward raises); whole texts can.
"""

from __future__ import annotations

import inspect
import sys
import types
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mismatch.mechanisms.base import Context, tensor_kind
from mismatch.mechanisms.parts.calling import cache_in, hidden_in
from mismatch.mechanisms.parts.initial_values import silu_inverse
from mismatch.mechanisms.parts.own_state import OwnState, entry
from mismatch.mechanisms.parts.projections import NORMS, AttentionParts
from mismatch.mechanisms.parts.text_by_text import text_by_text
from mismatch.mechanisms.parts.token_facts import facts_in


class States:
    """The cache interface that a mixer of transformers uses, for one layer and one call."""

    def __init__(self, rows: dict[str, Tensor]) -> None:
        # Single steps write into what they are given.
        self.rows = {name: x.clone() for name, x in rows.items()}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.rows.get("conv")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.rows.get("recurrent")

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update_conv_state(self, new: Tensor, layer_idx: int, conv_kernel_size: int) -> Tensor:
        """`batch channels pos` behind the last `conv_kernel_size` of before (zeros at the start)."""
        known = self.rows.get("conv")
        if known is None:
            known = new.new_zeros(*new.shape[:2], conv_kernel_size)
        seen = torch.cat([known, new], dim=-1)
        self.rows["conv"] = seen[..., -conv_kernel_size:].clone()
        return seen

    def update_recurrent_state(self, new: Tensor, layer_idx: int) -> Tensor:
        # Cloned: Mamba-2 returns a view into the states of all chunks.
        self.rows["recurrent"] = new.clone()
        return new


class Mixer(AttentionParts):
    """Base of the mechanisms that put a transformers mixer into the `attn` slot.

    A subclass sets `mixer` and, where it inherits, overrides `columns`.

    Attributes:
        inherits: whether the attention's projections stay, around a mixer without its own.
        width: of the mixer's output: all heads of the attention, or the stream.
    """

    mixer: nn.Module
    cache_name = "cache_params"
    """The mixer's keyword for its cache."""
    rotates = False
    """The order of the tokens is in the recurrence; cos and sin are not used."""

    def __init__(self, original: nn.Module, config: Any, context: Context) -> None:
        super().__init__(original, config, context)
        self._kind = tensor_kind(original, context)
        self.inherits: bool = getattr(config, "init", "fresh") == "inherit"
        self.width: int = self.n_heads * self.head_dim if self.inherits else context.d_model
        if not self.inherits:
            self.drop(*self._inputs, self._output, *NORMS)

    def drop(self, *names: str) -> None:
        """Leave these modules of the attention behind, where it has them."""
        for name in names:
            self._modules.pop(name, None)

    def drawn(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """`make()` in the original's dtype and device; its random numbers depend on seed, slot and `name` alone."""
        if self._kind["device"].type == "meta":
            with torch.device("meta"):
                return make().to(**self._kind)
        key = f"{self.context.seed}/{self.context.where}/{name}"
        # Drawn on the CPU in float32, so that a GPU or bfloat16 run starts from the same numbers.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(zlib.crc32(key.encode()))
            return make().to(**self._kind)

    def columns(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """What goes into the mixer, `batch pos any`, token by token: the stream, unless it inherits.

        Args:
            gate: in place of its own, where it has one, `batch pos width`.
        """
        return x

    def flat(self, heads: Tensor) -> Tensor:
        """`batch KV or H, pos, D` -> `batch pos H*D`, kv heads repeated for each query head of their group."""
        if heads.shape[1] != self.n_heads:
            heads = self.per_query_head(heads)
        return heads.transpose(1, 2).flatten(-2)

    @text_by_text
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """As the attention it replaces: `batch pos d_model` in, (`batch pos d_model`, None) out."""
        x, cache = hidden_in(args, kwargs), cache_in(kwargs)
        state = OwnState() if cache is None else entry(cache, self.layer_idx, OwnState)
        keep = facts_in(args, kwargs).real(x)
        # The one place that waits for a GPU, and only under padding.
        new = torch.full(x.shape[:1], x.shape[1]) if keep is None else keep.sum(1).cpu()
        columns = self.columns(x)
        if keep is None or bool((new == x.shape[1]).all()):
            y, rows = self.run(columns, state.rows)
        else:
            y, rows = self._padded(columns, keep, new, state.rows)
        if cache is not None:
            state.advance(new, x.shape[1], rows)
        if self.inherits:
            y = self.project(y.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2), x)
        return y, None

    def without_gate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Heads of whole texts with every gate at 1, `batch H pos D`; called as `forward`."""
        x = hidden_in(args, kwargs)
        one = silu_inverse(torch.ones(1, dtype=x.dtype, device=x.device))
        y, _ = self.run(self.columns(x, one.expand(*x.shape[:2], self.width)), {})
        return y.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)

    def run(self, columns: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mixer over real tokens, `batch pos any` -> `batch pos width`, and its state after them.

        It always gets a cache: without one, two of the mixers train through a fused kernel that needs the projections
        which they do not have here.
        """
        states = States(rows)
        return self.mixer(columns, **{self.cache_name: states}), states.rows

    def _padded(
        self, columns: Tensor, keep: Tensor, new: Tensor, rows: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`run` for rows with pads anywhere, those with equally many new real tokens at once; pads get zeros.

        Args:
            keep: bool `batch pos`, True = real.
            new: int64 `batch` on the CPU, real tokens of each row.
        """
        out, after = columns.new_zeros(*columns.shape[:2], self.width), dict(rows)
        for n in sorted(set(new.tolist()) - {0}):
            row = (new == n).nonzero()[:, 0].to(columns.device)
            at = keep[row].nonzero()[:, 1].unflatten(0, (-1, n))
            y, states = self.run(columns[row[:, None], at], {k: x[row] for k, x in rows.items()})
            out = out.index_put((row[:, None], at), y.to(out.dtype))
            for name, x in states.items():
                known = after.get(name)
                if known is None:  # a row of pads alone keeps the state of the start
                    known = x.new_zeros(len(new), *x.shape[1:])
                after[name] = known.index_copy(0, row, x)
        return out, after


def on_any_device(
    mixer: type[nn.Module], there: str, **instead: Callable[..., Any]
) -> type[nn.Module]:
    """The same mixer, which calls transformers' own torch code for tensors on a CPU whatever is installed.

    A mixer's forward finds its kernels among the globals of its file. The subclass has the same forward with other
    globals; nothing in transformers is changed.

    Args:
        mixer: a mixer class of transformers.
        there: the module that has this class as `Library`, where pickle finds it.
        instead: torch functions to call on a CPU in place of transformers' own, by the name of the kernel.
    """
    known = vars(sys.modules[mixer.__module__])
    # The outermost function fires accelerate's hooks for offloaded weights; tensors made here have none.
    forward = inspect.unwrap(mixer.forward)
    kernels = {
        name: by_device(known[name], instead.get(name, inspect.unwrap(known[name])))
        for name in forward.__code__.co_names
        if hasattr(known.get(name), "__wrapped__")
    }
    # Without a `__name__`, torch.compile reads these globals; with one, those of the module of that name.
    scope = {name: value for name, value in known.items() if name != "__name__"}
    own = types.FunctionType(
        forward.__code__,
        {**scope, **kernels},
        "forward",
        forward.__defaults__,
        forward.__closure__,
    )
    return type(
        mixer.__name__, (mixer,), {"forward": own, "__module__": there, "__qualname__": "Library"}
    )


def identity_taps(conv: nn.Conv1d) -> None:
    """Set a convolution so that each token sees itself alone: last tap 1, the others and the bias 0."""
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[..., -1] = 1
        if conv.bias is not None:
            conv.bias.zero_()


def by_device(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain` for tensors on a CPU, `kernel` elsewhere."""

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (plain if x.device.type == "cpu" else kernel)(x, *args, **kwargs)

    return call
