"""Windows of `seq_len` tokens out of documents, tokenised only as far as they are needed.

Rules: a window never mixes documents; only full windows; each begins with what the tokenizer puts
before a text (a BOS for llama and gemma tokenizers, nothing for SmolLM2, GPT-2 or Qwen); the order
is a seeded shuffle of the documents, first window of each in turn, then the second of each, so that
a few tokens come from many documents. No torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from mismatch.errors import DataError
from mismatch.texts.documents import Documents


class Batch(NamedTuple):
    """Some windows: ids int64 `batch seq_len`, doc int64 `batch`."""

    ids: np.ndarray
    doc: np.ndarray


@dataclass(frozen=True)
class Windows:
    """ids int64 `n seq_len`; doc int64 `n`: 0..n_docs-1 in order of first appearance."""

    ids: np.ndarray
    doc: np.ndarray
    names: tuple[str, ...]
    """Name of each document that appears, by document number."""
    asked: int
    """Tokens requested; there are fewer when the documents ran out."""
    prefix: tuple[int, ...]
    """Ids that the tokenizer put before each window."""

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
        """sha256 over shape, ids and document numbers: equal means the same input, byte by byte."""
        whole = hashlib.sha256(repr(self.ids.shape).encode())
        for array in (self.ids, self.doc):
            whole.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return whole.hexdigest()

    def behind(self, first: int) -> Windows:
        """The windows from `first` on, their documents numbered anew."""
        docs = self.doc[first:].tolist()
        order = {doc: at for at, doc in enumerate(dict.fromkeys(docs))}
        numbers = np.array([order[doc] for doc in docs], np.int64)
        names = tuple(self.names[doc] for doc in order)
        return replace(self, ids=self.ids[first:], doc=numbers, names=names)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All windows in order, `batch_size` at a time; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            at = slice(start, start + batch_size)
            yield Batch(self.ids[at], self.doc[at])


def windows(
    documents: Documents, tokenizer: Any, seq_len: int, tokens: int, seed: int = 0
) -> Windows:
    """The first `tokens // seq_len` windows in the order of the module docstring.

    Args:
        documents: what to cut.
        tokenizer: a transformers tokenizer.
        seq_len: tokens per window, the tokenizer's prefix included.
        tokens: at most so many tokens in all; fewer when the documents run out.
        seed: of the order of documents.

    Raises:
        DataError: `tokens` or `seq_len` not positive, `tokens` below one window, no document as
            long as one window.
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
    order = np.random.default_rng(seed).permutation(len(documents))
    wanted = tokens // seq_len
    cut = _Cutter(documents, tokenizer, prefix, body)
    rows: list[np.ndarray] = []
    owners: list[int] = []
    turn = 0
    while len(rows) < wanted:
        before = len(rows)
        for at in order:
            if (window := cut.window(int(at), turn)) is not None:
                rows.append(window)
                owners.append(int(at))
                if len(rows) == wanted:
                    break
        if len(rows) == before:  # a whole turn without a window: the documents ran out
            break
        turn += 1
    if not rows:
        longest = cut.longest + len(prefix)
        raise DataError(
            f"{documents.source}: no document fills a window of --seq-len {seq_len}; the longest "
            f"has {longest} tokens",
            hint=f"take --seq-len {longest} or less" if longest > 2 else "give longer text",
        )
    numbers = {owner: i for i, owner in enumerate(dict.fromkeys(owners))}
    return Windows(
        ids=np.stack(rows),
        doc=np.array([numbers[owner] for owner in owners], dtype=np.int64),
        names=tuple(documents.names[owner] for owner in numbers),
        asked=tokens,
        prefix=prefix,
    )


class _Cutter:
    """Windows of documents on demand; each document is tokenised once, when first asked for."""

    def __init__(
        self, documents: Documents, tokenizer: Any, prefix: tuple[int, ...], body: int
    ) -> None:
        self.texts = documents.texts
        self.tokenizer = tokenizer
        self.prefix = np.array(prefix, dtype=np.int64)
        self.body = body
        self.longest = 0
        self.cut: dict[int, np.ndarray] = {}  # document -> full windows, `n body`

    def window(self, at: int, turn: int) -> np.ndarray | None:
        if at not in self.cut:
            ids = self.tokenizer(self.texts[at], add_special_tokens=False, verbose=False).input_ids
            self.longest = max(self.longest, len(ids))
            full = len(ids) // self.body
            kept = np.array(ids[: full * self.body], dtype=np.int64)
            self.cut[at] = kept.reshape(full, self.body)
        parts = self.cut[at]
        return np.concatenate([self.prefix, parts[turn]]) if turn < len(parts) else None


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
