"""What is known of the tokens of a forward: which are padding, and which text of its row each belongs to.

A mechanism with a state, or one that counts tokens, has to know both, and transformers passes its layers neither: no
mask for unpadded rows, one of queries and keys for the others. So surgery adds one keyword to the decoder's call, and a
decoder passes keywords that it does not know on to its layers:

    student.model(ids, attention_mask=..., position_ids=...)
      decoder(..., token_facts=TokenFacts)        by the hook `add_token_facts`
        block(..., token_facts=...)
          attention(..., token_facts=...)         read by `facts_in(args, kwargs)`

The facts travel with the call. Two forwards before one backward, a layer that is computed again under gradient
checkpointing, and threads all find their own. A module that is called by itself has the facts of that call.

They are read from what the host's attention reads, as it reads it (`transformers.masking_utils`):

| the caller passes | padding | texts |
|---|---|---|
| no mask | none | a new one where `position_ids` do not go on by 1 |
| a 2-D mask, `batch keys`, 1 = real | its zeros | one per row |
| a 4-D mask, `batch 1 queries keys`, bool or added | what no real token reads | blocks that read themselves alone |
| a dict of masks by layer type | those of full attention | |

Refused is what would be wrong without a word: several texts with a KV cache (the host lets them read one another then),
a mask that is not causal + padding + texts (+ the model's own window), and keywords of packing collators (`seq_idx`,
`cu_seq_lens_q`) that tell of other texts than mask and positions do. Nothing is read before a mechanism asks.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    find_first_full_attention_index,
    find_packed_sequence_indices,
)

from mismatch.errors import SurgeryError
from mismatch.mechanisms.parts.calling import cache_in, hidden_in

NAME = "token_facts"
COLLATED = ("seq_idx", "cu_seq_lens_q")
HIDDEN = -1e4  # what is added to a hidden score, at most: its exp is 0 in every dtype


class Read(NamedTuple):
    """What a mask and positions say of Q new tokens behind P cached ones.

    Attributes:
        keys: bool `batch or 1, P+Q`, True = real; `batch or 1, Q` where a window hides older keys and positions do not
            tell of them; None = all real.
        texts: int64 `batch or 1, Q`, the number of each token's text in its row, -1 of pads; None = one text a row.
    """

    keys: Tensor | None = None
    texts: Tensor | None = None


class TokenFacts:
    """The facts of one forward, or of a module that is called by itself.

    Args:
        length: Q, new tokens of each row.
        mask: as the caller passes it; see the table above.
        positions: int64 `batch or 1, Q`.
        cache: of the call, before anything is written to it.
        window: tokens that the model's own attention reads, where it has a window.
        collated: what a packing collator adds: `seq_idx` `batch Q`, `cu_seq_lens_q` `texts+1`.
    """

    def __init__(
        self,
        length: int,
        mask: Any = None,
        positions: Tensor | None = None,
        cache: Any = None,
        window: int | None = None,
        collated: dict[str, Any] | None = None,
    ) -> None:
        self.length, self._mask, self._positions = length, mask, positions
        self._window, self._collated = window, collated or {}
        self._known: Read | None = None
        self._past: int | Tensor = 0  # P
        self._offset = 0  # the number of the first key in a 4-D mask
        if isinstance(cache, Cache):
            layer = find_first_full_attention_index(cache)
            past, self._offset = (
                cache.get_query_offset(layer),
                cache.get_mask_sizes(length, layer)[1],
            )
            # A static cache counts in a tensor, and goes on counting.
            self._past = past.clone() if isinstance(past, Tensor) else past

    def real(self, x: Tensor) -> Tensor | None:
        """Which new tokens are no padding: bool `batch pos`; None = all.

        Args:
            x: input of the module, `batch pos any`.

        Raises:
            SurgeryError: a mask that cannot be read, or that of another batch.
        """
        keys = self._read.keys
        return None if keys is None else _fit(keys[:, -self.length :], x, "padding mask")

    def texts(self, x: Tensor, cache: Any = None) -> Tensor | None:
        """The text of each new token: int64 `batch pos`, rising along a row, -1 for pads; None = one text per row.

        Args:
            x: input of the module, `batch pos any`.
            cache: of the module's call.

        Raises:
            SurgeryError: a mask that cannot be read, or that of another batch; several texts and a cache.
        """
        texts = self._texts(cache)
        return None if texts is None else _fit(texts, x, "texts")

    def numbers(self, count: int, offset: int, x: Tensor, cache: Any = None) -> Tensor | None:
        """Which token of its text each key is, counted in real tokens from 0: int64 `batch or 1, keys`, -1 for pads;
        None = the number of the key, every token is real.

        Args:
            count, offset: how many keys the attention sees, and the number of the first among all tokens.
            x, cache: of the module's call.

        Raises:
            SurgeryError: as `texts`; or a mask with a window, which hides older keys.
        """
        total, keys, texts = int(self._past) + self.length, self._read.keys, self._texts(cache)
        if keys is None:
            if texts is None:
                return None
            keys = torch.ones_like(texts, dtype=torch.bool)
        if keys.shape[1] != total:
            _refuse(self._mask, "it has a window, and older tokens have to be counted")
        number = keys.long().cumsum(1) - 1
        if texts is not None:  # then nothing is cached
            begins = F.pad(texts[:, 1:] != texts[:, :-1], (1, 0), value=True) & keys
            number = number - number.masked_fill(~begins, 0).cummax(1).values
        number = number.masked_fill(~keys, -1).to(x.device)
        unwritten = max(0, offset + count - total)  # of a static cache
        return F.pad(number, (0, unwritten), value=-1)[:, offset : offset + count]

    def _texts(self, cache: Any) -> Tensor | None:
        if self._read.texts is not None and cache is not None:
            raise SurgeryError(
                "a row holds several texts, and the call has a KV cache: with a cache the model's own attention reads "
                "across texts",
                hint="pass use_cache=False and no past_key_values, or one text per row",
            )
        return self._read.texts

    @property
    def _read(self) -> Read:
        # Looked at once per forward, not once per layer: the values come from the device. Kept by hand: the lock of
        # `functools.cached_property` cannot be compiled.
        if self._known is None:
            self._known = self._found()
        return self._known

    def _found(self) -> Read:
        mask = self._mask
        if isinstance(mask, dict):
            mask = mask["full_attention" if "full_attention" in mask else "sliding_attention"]
        if mask is None:
            read = Read(texts=self._restarts())
        elif isinstance(mask, Tensor) and mask.ndim == 2:
            read = self._from_padding(mask)
        elif isinstance(mask, Tensor) and mask.ndim == 4:
            read = self._from_pairs(mask)
        else:
            _refuse(mask, "it is neither 2-D nor 4-D")
        for name in COLLATED:
            if self._collated.get(name) is not None:
                self._check_collated(name, self._collated[name], read.texts)
        return read

    def _restarts(self) -> Tensor | None:
        positions = self._positions
        if positions is None or self.length == 1:
            return None
        texts = find_packed_sequence_indices(positions)
        # Under torch.compile it returns the texts even when there is one.
        return None if texts is None or not bool(texts.any()) else texts

    def _from_padding(self, mask: Tensor) -> Read:
        total = int(self._past) + self.length
        if mask.shape[1] < total:
            _refuse(mask, f"there are {total} tokens, {int(self._past)} of them cached")
        return Read(_unless_all(mask[:, :total].bool()))

    def _from_pairs(self, given: Tensor) -> Read:
        past = int(self._past)
        mask, here = given, past - int(self._offset)
        if given.is_floating_point():
            if not bool(((given == 0) | (given <= HIDDEN)).all()):
                _refuse(given, "it adds numbers that are neither 0 nor large and negative")
            mask = given == 0
        elif given.dtype != torch.bool:
            _refuse(given, f"it holds {str(given.dtype).removeprefix('torch.')}")
        if given.shape[2] != self.length or given.shape[3] < here + self.length:
            _refuse(given, f"the call has {self.length} new tokens behind {past} cached ones")
        if not bool((mask == mask[:, :1]).all()):
            _refuse(given, "its heads differ")
        old, new = mask[:, 0, :, :here], mask[:, 0, :, here : here + self.length]
        # A pad does not read itself; or, where no query is left without a key, it reads what comes later.
        real = new.diagonal(dim1=1, dim2=2) & ~new.triu(1).any(-1)
        begins = real & ~old.any(-1) & ~new.tril(-1).any(-1)
        texts = begins.long().cumsum(1)  # 0: goes on where the cache ends
        pairs = ((texts[:, :, None] == texts[:, None]) & real[:, None]).tril()
        windowed = self._window is not None and not _agree(new, pairs, real)
        if windowed:
            pairs = pairs.triu(1 - (self._window or 0))
        if not _agree(new, pairs, real):
            _refuse(given, "it is not causal + padding + texts that read themselves alone")
        apart = texts.masked_fill(~real, -1) if bool(_count(texts, real).max() > 1) else None
        if past and (windowed or self._offset):
            return Read(self._behind_a_window(old, real), apart)
        goes_on = (real & (texts == 0))[..., None]
        known = (old & goes_on).any(1)
        if not _agree(old, known[:, None] & goes_on, real):
            _refuse(given, "the tokens of one text read different cached ones")
        return Read(_unless_all(torch.cat([known, real], dim=1)), apart)

    def _behind_a_window(self, old: Tensor, real: Tensor) -> Tensor | None:
        """`Read.keys` where cached keys are hidden: pads stand before the text, as many as its positions are behind.

        Args:
            old: which cached keys of the mask each new token reads, `batch or 1, Q, keys`.
            real: new tokens, `batch or 1, Q`.
        """
        past, offset = int(self._past), int(self._offset)
        number = torch.arange(past + self.length, device=real.device)
        keys = torch.ones_like(number, dtype=torch.bool)[None]
        if self._positions is not None:
            keys = number >= number[-1] - self._positions[:, -1:].to(real.device)
        reads = keys[:, None, offset:past] & real[..., None]
        if self._window is not None:
            reads = reads & (number[past:, None] - number[offset:past] < self._window)
        told = _agree(old, reads, real) and bool((keys[:, past:] == real).all())
        return _unless_all(keys) if told else real

    def _check_collated(self, name: str, given: Tensor, texts: Tensor | None) -> None:
        """Refuse boundaries of texts that are not those which the attention sees."""
        if name == "seq_idx":
            theirs = given[:, 1:] != given[:, :-1]
        else:
            flat = torch.zeros(max(self.length, int(given[-1])), dtype=torch.bool)
            flat[given[:-1].long().cpu()] = True
            theirs = flat[: len(flat) // self.length * self.length].unflatten(0, (-1, self.length))[
                :, 1:
            ]
        ours = torch.zeros(1, self.length - 1, dtype=torch.bool)
        if texts is not None:
            ours = (texts[:, 1:] != texts[:, :-1]).cpu()
        if not bool((theirs.cpu() == ours).all()):
            raise SurgeryError(
                f"`{name}` tells of other texts in a row than position_ids and attention_mask do, which are what the "
                "model's own attention reads",
                hint="pass position_ids that begin anew with each text, and no attention_mask",
            )


def _fit(found: Tensor, x: Tensor, what: str) -> Tensor:
    """Facts for the rows of x: one row of facts is that of every row.

    Raises:
        SurgeryError: they are those of another batch.
    """
    if found.shape[0] not in (1, x.shape[0]) or found.shape[1] != x.shape[1]:
        raise SurgeryError(
            f"{what} {tuple(found.shape)} for an input {tuple(x.shape[:2])}",
            hint="the mask or the positions are those of another batch",
        )
    return found.expand(x.shape[0], -1).to(x.device)


def _unless_all(real: Tensor) -> Tensor | None:
    return None if bool(real.all()) else real


def _agree(got: Tensor, wanted: Tensor, real: Tensor) -> bool:
    """Whether all real tokens read what they should; what a pad reads is of no matter."""
    return not bool(((got != wanted) & real[..., None]).any())


def _count(texts: Tensor, real: Tensor) -> Tensor:
    """Texts of each row, `batch`."""
    first = texts.masked_fill(~real, texts.shape[1] + 1).amin(1)
    return texts.masked_fill(~real, -1).amax(1) - first + 1


def _refuse(mask: Any, why: str) -> NoReturn:
    shape = f"Tensor{list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise SurgeryError(
        f"the attention mask {shape} cannot be read by a mechanism that must know padding and texts: {why}",
        hint="pass the tokenizer's attention_mask, [batch, tokens so far]; several texts in a row by position_ids that "
        "begin anew, without a mask",
    )


def facts_in(args: tuple, kwargs: dict[str, Any]) -> TokenFacts:
    """The facts of the running forward, from what a module of it is called with."""
    found = kwargs.get(NAME)
    if found is not None:
        return found
    mask = kwargs.get("attention_mask")
    if mask is None:  # gpt2's block gets it without a name
        mask = next((x for x in args[1:] if isinstance(x, Tensor) and x.ndim == 4), None)
    length, cache = hidden_in(args, kwargs).shape[1], cache_in(kwargs, args)
    return TokenFacts(length, mask, kwargs.get("position_ids"), cache, collated=kwargs)


def add_token_facts(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a decoder: its call, with the facts of its tokens."""
    given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
    tokens = given.get("input_ids")
    if tokens is None and given.get("inputs_embeds") is not None:
        tokens = given["inputs_embeds"][..., 0]
    if tokens is None or NAME in kwargs:
        return None
    facts = TokenFacts(
        tokens.shape[-1],
        given.get("attention_mask"),
        given.get("position_ids"),
        given.get("past_key_values"),
        getattr(decoder.config, "sliding_window", None),
        kwargs,
    )
    return args, {**kwargs, NAME: facts}
