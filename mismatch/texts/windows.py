"""Windows of `seq_len` tokens out of documents, tokenised only as far as they are needed.

Rules: a window never mixes documents; only full windows; each begins with what the tokenizer puts
before a text (a BOS for llama and gemma tokenizers, nothing for SmolLM2, GPT-2 or Qwen); the order
is a seeded shuffle of the documents, one window of each in turn, so that a few tokens come from many
documents. Which window of a document comes first is drawn too: its opening is not like the rest of it.
No torch.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from mismatch.errors import DataError
from mismatch.texts.cutting import Cutter, Window
from mismatch.texts.documents import Documents


class Batch(NamedTuple):
    """Some windows: ids int64 `batch seq_len`, doc int64 `batch`, scored bool `batch seq_len`."""

    ids: np.ndarray
    doc: np.ndarray
    scored: np.ndarray


@dataclass(frozen=True)
class Source:
    """What became of the documents that windows were cut from.

    Attributes:
        documents: there were, copies left out.
        copies: left out, for another document holds the same.
        seen: documents that were looked at until there were enough tokens.
        left_out: of those, documents without a window: too short for one, or without an answer where answers count.
        more: where the source goes on behind what was read: the bytes up to which it was; else 0.
        revision: of a data set of the hub: the commit.
    """

    documents: int
    copies: int = 0
    seen: int = 0
    left_out: int = 0
    more: int = 0
    revision: str = ""


@dataclass(frozen=True)
class Windows:
    """ids int64 `n seq_len`; doc int64 `n`: 0..n_docs-1 in order of first appearance."""

    ids: np.ndarray
    doc: np.ndarray
    offset: np.ndarray
    """int64 `n`: place of each window in its document: the tokens before it. Of a document that is too long to be
    tokenised whole it is an estimate, but in order."""
    scored: np.ndarray
    """bool `n seq_len`: the prediction made at this token, of the next one, counts in what is measured."""
    names: tuple[str, ...]
    """Name of each document that appears, by document number."""
    asked: int
    """Tokens requested; there are fewer when the documents ran out."""
    prefix: tuple[int, ...]
    """Ids that the tokenizer put before each window."""
    source: Source

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def seq_len(self) -> int:
        """Tokens per window."""
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return self.ids.size

    @property
    def n_docs(self) -> int:
        """Documents that appear in a window."""
        return len(self.names)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over shape, ids, document numbers and what counts: equal means the same input, byte by byte."""
        whole = hashlib.sha256(repr(self.ids.shape).encode())
        for array in (self.ids, self.doc):
            whole.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        if not self.scored.all():
            whole.update(self.scored.tobytes())
        return whole.hexdigest()

    def part(self, which: slice | np.ndarray) -> Windows:
        """Some of the windows, their documents numbered anew."""
        docs = self.doc[which].tolist()
        order = {doc: at for at, doc in enumerate(dict.fromkeys(docs))}
        return replace(
            self,
            ids=self.ids[which],
            doc=np.array([order[doc] for doc in docs], np.int64),
            offset=self.offset[which],
            scored=self.scored[which],
            names=tuple(self.names[doc] for doc in order),
        )

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All windows in order, `batch_size` at a time; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            at = slice(start, start + batch_size)
            yield Batch(self.ids[at], self.doc[at], self.scored[at])


def windows(
    documents: Documents,
    tokenizer: Any,
    seq_len: int,
    tokens: int,
    seed: int = 0,
    *,
    answers: bool = False,
) -> Windows:
    """The first `tokens // seq_len` windows in the order of the module docstring.

    Args:
        documents: what to cut.
        tokenizer: a transformers tokenizer.
        seq_len: tokens per window, the tokenizer's prefix included.
        tokens: at most so many tokens in all; fewer when the documents run out.
        seed: of the order of documents, and of the windows of each.
        answers: only predictions of what the assistant says count (`mismatch.texts.tokens`).

    Raises:
        DataError: `tokens` or `seq_len` not positive, `tokens` below one window, no document as
            long as one window; answers asked of documents that hold none.
    """
    prefix = prefix_ids(tokenizer)
    body = seq_len - len(prefix)
    if body < 2:
        raise DataError(f"--seq-len {seq_len} leaves no room for text", hint="take 2 or more")
    if tokens < seq_len:
        raise DataError(
            f"--tokens {tokens} is less than one window of --seq-len {seq_len}",
            hint=f"take --tokens {seq_len} or more, or a smaller --seq-len",
        )
    order = np.random.default_rng(seed).permutation(len(documents)).tolist()
    wanted = tokens // seq_len
    cutters: dict[int, Cutter] = {}
    found: list[tuple[int, Window]] = []
    while order and len(found) < wanted:
        left = []
        for at in order:
            if at not in cutters:
                text, name = documents.texts[at], documents.names[at]
                cutters[at] = Cutter(text, name, tokenizer, prefix, body, (seed, at), answers)
            if (window := cutters[at].next()) is not None:
                left.append(at)
                found.append((at, window))
                if len(found) == wanted:
                    break
        order = left
    if not found:
        raise _nothing(documents.source, cutters, seq_len, len(prefix))
    numbers = {owner: i for i, owner in enumerate(dict.fromkeys(owner for owner, _ in found))}
    return Windows(
        ids=np.stack([np.array([*prefix, *window.ids], np.int64) for _, window in found]),
        doc=np.array([numbers[owner] for owner, _ in found], np.int64),
        offset=np.array([window.offset for _, window in found], np.int64),
        scored=np.stack([_counts(window, len(prefix), seq_len) for _, window in found]),
        names=tuple(documents.names[owner] for owner in numbers),
        asked=tokens,
        prefix=prefix,
        source=Source(
            documents=len(documents),
            copies=documents.copies,
            seen=len(cutters),
            left_out=len(cutters) - len(numbers),
            more=documents.more,
            revision=documents.revision,
        ),
    )


def _counts(window: Window, prefix: int, seq_len: int) -> np.ndarray:
    """bool `seq_len`: which predictions of a window count."""
    scored = np.ones(seq_len, bool)
    if window.scored is not None:
        scored[:prefix] = False
        scored[prefix:] = window.scored
    return scored


def _nothing(source: str, cutters: Mapping[int, Cutter], seq_len: int, prefix: int) -> DataError:
    """Why there is not one window."""
    likely = heapq.nlargest(100, cutters.values(), key=lambda cutter: cutter.bound)
    longest = prefix + max(cutter.measure() for cutter in likely)
    if longest >= seq_len:
        return DataError(
            f"{source}: no window of --seq-len {seq_len} holds a token of an answer",
            hint="take a longer --seq-len, or count all tokens: leave out --answers-only",
        )
    return DataError(
        f"{source}: no document fills a window of --seq-len {seq_len}; the longest has {longest} tokens",
        hint=f"take --seq-len {longest} or less" if longest > 2 else "give longer text",
    )


def prefix_ids(tokenizer: Any) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text, usually one BOS or none.

    They are found by calling it, as in the model's training, and not by its `bos_token` (SmolLM2 names `<|im_start|>`,
    which opens a chat turn, and adds none). A suffix (EOS) is not used: a window is a piece of a text, not its end.

    Raises:
        DataError: the tokenizer changes the ids of the text itself when it adds special tokens.
    """
    probe = "a b"
    plain = tokenizer(probe, add_special_tokens=False).input_ids
    whole = tokenizer(probe).input_ids
    # From the right: where BOS is also the unknown token, the probe itself may look like it.
    for start in reversed(range(len(whole) - len(plain) + 1)):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    raise DataError(
        "the tokenizer changes the text's own ids when it adds its special tokens, so windows "
        f"cannot be cut: {plain} became {whole}"
    )
