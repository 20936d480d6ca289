"""ring: the same attention, computed block by block of keys. Its shift must be 0.

    out = softmax(cap(scaling q k^T) + mask) v      the same numbers; never all scores at once

Source: Ring Attention with Blockwise Transformers, arXiv 2310.01889, section 2 and algorithm 1; the
algorithm is in `blockwise.py`. Scaling, softcap, grouped heads, own window, padding and the KV cache
are the host's, so what is measured is rounding: a check of the plumbing, and what memory a long text
needs, not an approximation. Backward computes every block again: memory grows with the length, not
with its square. It has no dropout of attention weights: a module that trains with it is refused.

One text over several processes has to be asked for, because under torchrun the ranks of `trace` take
different documents. With `ring` in every layer,

    with spread(student.model):
        out = student.model(ids[:, mine], position_ids=mine[None], use_cache=False)

each process gives its own run of the tokens, in rank order, and gets the logits of that run; keys and
values go round the ring. Parameters' gradients are then partial sums: add them up over the processes. The
loss at the border of two runs is the caller's, who knows the next run's first token. Torch's own
context parallel has no CPU backend and is not used. Inherited: every projection, bias and query/key
norm. New, dropped: nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from torch import Tensor, distributed, nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context
from mismatch.mechanisms.parts.blockwise import Reads, gathered, ring_attention
from mismatch.mechanisms.parts.calling import cache_in, hidden_in
from mismatch.mechanisms.parts.projections import AttentionParts
from mismatch.mechanisms.parts.text_by_text import each_alone
from mismatch.mechanisms.parts.token_facts import TokenFacts, facts_in
from mismatch.models.layout import Layout

if TYPE_CHECKING:
    from mismatch.models.layout import CausalLM


@dataclass(frozen=True)
class RingConfig:
    block: Annotated[int, ">= 1"] = 256
    """Keys that are worked on at once."""


class Ring(AttentionParts):
    """Softmax attention over the projections of the attention it replaces, in blocks."""

    Config = RingConfig
    slots = ("attn",)
    heads = True
    identity = "always, up to rounding"
    state = "the host's KV cache"
    source = "arXiv 2310.01889, section 2 and algorithm 1"

    def __init__(self, original: nn.Module, config: RingConfig, context: Context) -> None:
        super().__init__(original, config, context)
        self.processes: Any = None  # the processes that share one text; set by `spread`

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """As the attention it replaces: `batch pos d_model` in, (`batch pos d_model`, None) out.

        Raises:
            SurgeryError: training with dropout; a mask that is neither 4-D nor absent; a cache or
                pads while the text is spread.
        """
        x, cache = hidden_in(args, kwargs), cache_in(kwargs)
        if self.training and self._dropout > 0:
            raise SurgeryError(
                f"{self.context.where}: `ring` has no dropout of attention weights, and this model "
                f"trains with {self._dropout}",
                hint="call eval(), or load the model with attention dropout 0",
            )
        mask, facts = self._mask(kwargs.get("attention_mask")), facts_in(args, kwargs)
        if mask is None and self.processes is None:
            # A mask of queries and keys says it all; it may be one that no facts can be read from.
            texts = facts.texts(x, cache)
            if texts is not None:
                return each_alone(self.forward, args, kwargs, texts)
        q, k, v = self.qkv(x)
        q, k = self.rotate(q, k, kwargs.get("position_embeddings"))
        if self.processes is not None:
            reads = self._spread(cache, facts.texts(x) is None and facts.real(x) is None)
        else:
            reads = self._reads(x, cache, mask, facts)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        return self.project(ring_attention(q, k, v, reads), x), None

    def _reads(self, x: Tensor, cache: Any, mask: Tensor | None, facts: TokenFacts) -> Reads:
        """What is read in one process: keys of the cache and of this call."""
        past, keys, offset = 0, x.shape[1], 0
        if cache is not None:
            past = cache.get_seq_length(self.layer_idx)
            keys, offset = cache.get_mask_sizes(x.shape[1], self.layer_idx)
        number = facts.numbers(keys, offset, x, cache) if mask is None else None
        real = None if number is None else number >= 0
        return self._how(first=past - offset, mask=mask, real=real)

    def _mask(self, given: Any) -> Tensor | None:
        """The host's mask if it is one of queries and keys; a 2-D one is only the padding."""
        if given is None or (isinstance(given, Tensor) and given.ndim == 2):
            return None
        if not isinstance(given, Tensor) or given.ndim != 4 or given.shape[1] != 1:
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise SurgeryError(
                f"{self.context.where}: the host passes its attention the mask {shape}; `ring` "
                "reads [batch, 1, queries, keys]",
                hint="load the model with attn_implementation='sdpa' or 'eager'",
            )
        return given

    def _spread(self, cache: Any, one_text: bool) -> Reads:
        """What is read while one text lies on several processes."""
        if cache is not None or not one_text:
            raise SurgeryError(
                f"{self.context.where}: a text that is spread over processes takes no "
                f"{'KV cache' if one_text else 'padding and no second text in its row'}",
                hint="call the model with use_cache=False"
                if one_text
                else "unpadded text of one length",
            )
        return self._how(group=self.processes)

    def _how(self, **more: Any) -> Reads:
        return Reads(self.scaling, self.softcap, self.window, self.settings.block, **more)


@contextmanager
def spread(model: CausalLM, group: Any = None) -> Iterator[None]:
    """While the context lives, each process of `group` calls `model` on its own run of one text's tokens.

    Args:
        model: with `ring` as the attention of every layer, the same on every process.
        group: torch.distributed processes in the order of the text; None = all.

    Raises:
        SurgeryError: no process group; a layer without `ring` (it would read its own tokens only);
            and, when the model is called, position_ids that do not go on where the rank before
            ends.
    """
    if not distributed.is_initialized():
        raise SurgeryError(
            "there are no processes to spread a text over",
            hint="start with torchrun and call torch.distributed.init_process_group first",
        )
    group = distributed.group.WORLD if group is None else group
    layout = Layout.of(model)
    attentions = [
        model.get_submodule(layout.slot_path(layer, "attn")) for layer in range(layout.n_layers)
    ]
    rings = [attention for attention in attentions if type(attention) is Ring]
    others = [f"{i} ({type(a).__name__})" for i, a in enumerate(attentions) if type(a) is not Ring]
    if others:
        raise SurgeryError(
            "a text is spread over processes, and the attention of these layers would read one "
            f"process's tokens only: {', '.join(others)}",
            hint="swap `all:ring`, with nothing around it",
        )

    def check(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        _check_positions(kwargs, args[0] if args else None, group)

    handle = layout.decoder.register_forward_pre_hook(check, with_kwargs=True)
    try:
        for ring in rings:
            ring.processes = group
        yield
    finally:
        handle.remove()
        for ring in rings:
            ring.processes = None


def _check_positions(kwargs: dict[str, Any], ids: Tensor | None, group: Any) -> None:
    """Refuse positions that start anew in each process: the model would count from 0 everywhere.
    Every rank refuses when one must, or the others would wait for it."""
    given = [ids, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    tokens = next(x for x in given if x is not None)
    lengths = gathered(group, tokens.shape[1], tokens.device)
    positions, here = kwargs.get("position_ids"), -1
    if positions is not None and bool((positions[:, 0] == positions[0, 0]).all()):
        here = int(positions[0, 0])
    for rank, got in enumerate(gathered(group, here, tokens.device)):
        first = sum(lengths[:rank])
        if got != first:
            shown = "no position_ids, or rows that differ" if got < 0 else f"first position {got}"
            raise SurgeryError(
                f"rank {rank} holds the text from token {first} on, and got {shown}",
                hint=f"pass position_ids from {first} to {first + lengths[rank] - 1} there",
            )
