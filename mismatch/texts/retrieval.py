"""Training text in which something must be retrieved: ordinary text rarely asks for what stands far back.

| kind | a window |
|---|---|
| needles | training text with one to six sentences hidden in it, up to four of them asked for at the end |
| copies | training text in which one to three spans of 16 to 64 tokens stand again, further back |
| repeats | 24 to 200 random tokens, again and again, with or without text in between |
| lists | eight or more pairs in one format, then some of them again in the same format |

The kinds take turns. Wordings, formats and names are those of `TRAINING` in `mismatch.texts.wordings`, which no probe
and no judge uses; the text in between is the training text that is given, never held-out text. Values are numbers,
words or letters. Everything follows from the seed. Source: the mix that taught a small net which tokens to keep in a
bounded cache of SmolLM2 (needles and text: passkey -3.6 to -0.05, lists -2.8 to -1.5); text alone taught it less.
No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mismatch.texts import wordings
from mismatch.texts.windows import Windows

NAME = "retrieval-shaped"
"""The document that these windows are of."""
LEAST = 256
"""Tokens of a window: in a shorter one nothing stands far back."""
SPAN = (16, 64)  # tokens that are copied
REPEATS = (24, 40, 64, 100, 160, 200)  # random tokens that are repeated
GAPS = (0, 0, 8, 60)  # tokens of text between two of them
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


def unable(tokenizer: Any, seq_len: int) -> str | None:
    """Why there cannot be such text for a tokenizer and windows of `seq_len` tokens; None: there can."""
    if not wordings.reads(tokenizer, "48213"):
        return "its tokenizer does not give digits back as they were"
    if seq_len < LEAST:
        return (
            f"windows of {seq_len} tokens are shorter than {LEAST}: nothing stands far back in them"
        )
    return None


def retrieval_windows(
    read: Windows, tokenizer: Any, words: np.ndarray, tokens: int, seed: int
) -> Windows:
    """As many windows as the tokens fill, of the length of those that are given.

    Args:
        read: windows of training text, from which the text in between is taken.
        tokenizer: of the model; `unable` says None of it.
        words: int64, the ids that random tokens are drawn from.
        tokens: at most so many in all.
        seed: of every draw.
    """
    maker = _Maker(
        read.ids[:, len(read.prefix) :], tokenizer, words, np.random.default_rng([seed, 7])
    )
    kinds: tuple[Callable[[], list[int]], ...] = (
        maker.needles,
        maker.copies,
        maker.repeats,
        maker.lists,
    )
    count = tokens // read.seq_len
    rows = [[*read.prefix, *kinds[at % len(kinds)]()] for at in range(count)]
    return replace(
        read,
        ids=np.array(rows, np.int64).reshape(count, read.seq_len),
        doc=np.zeros(count, np.int64),
        offset=np.arange(count) * read.seq_len,
        scored=np.ones((count, read.seq_len), bool),
        names=(NAME,) if count else (),
        asked=tokens,
    )


def mixed(read: Windows, made: Windows) -> Windows:
    """Both, evenly mixed: of any first part the shares are those of the whole."""
    place = np.concatenate(
        [(np.arange(len(part)) + 0.5) / max(len(part), 1) for part in (read, made)]
    )
    order = np.argsort(place, kind="stable")
    ids, offset, scored = (
        np.concatenate([getattr(read, name), getattr(made, name)])[order]
        for name in ("ids", "offset", "scored")
    )
    doc = np.concatenate([read.doc, read.n_docs + made.doc])[order]
    both = replace(
        read,
        ids=ids,
        doc=doc,
        offset=offset,
        scored=scored,
        names=(*read.names, *made.names),
        asked=read.asked + made.asked,
    )
    return both.part(slice(None))  # documents are numbered as they appear


def made_tokens(windows: Windows) -> int:
    """Tokens of retrieval-shaped text among some windows."""
    if NAME not in windows.names:
        return 0
    return int((windows.doc == windows.names.index(NAME)).sum()) * windows.seq_len


@dataclass
class _Maker:
    """One window after the other, each without its prefix."""

    text: np.ndarray
    tokenizer: Any
    words: np.ndarray
    draw: np.random.Generator

    def needles(self) -> list[int]:
        names = self._names(int(self.draw.integers(1, 7)))
        pairs = [(self._of(wordings.TRAINING), name, self._value()) for name in names]
        hidden = [self._read(f"\n{how.said(name, value)}\n") for how, name, value in pairs]
        asked = self.draw.permutation(len(pairs))[:4]
        tail: list[int] = []
        for how, name, value in (pairs[at] for at in asked):
            tail += self._read(f"\n{how.asked(name)} {value}")
        room = self.size - len(tail) - sum(map(len, hidden))
        if room < self.size // 4:  # too much to hide: fewer of them
            return self.needles()
        text, last = self._text(), 0
        row: list[int] = []
        for cut, sentence in zip(
            sorted(self.draw.integers(0, room, len(hidden))), hidden, strict=True
        ):
            row += text[last:cut] + sentence
            last = cut
        return row + text[last:room] + tail

    def copies(self) -> list[int]:
        row = self._text()
        for _ in range(self.draw.integers(1, 4)):
            span = int(self.draw.integers(*SPAN))
            start = int(self.draw.integers(0, self.size - 2 * span))
            again = int(self.draw.integers(start + span, self.size - span + 1))
            row[again : again + span] = row[start : start + span]
        return row

    def repeats(self) -> list[int]:
        count = min(int(self.draw.choice(REPEATS)), self.size // 2, len(self.words))
        span = self.draw.choice(self.words, count, replace=False).tolist()
        text = self._text()
        row: list[int] = []
        while len(row) < self.size:
            gap = int(self.draw.choice(GAPS))
            row += text[len(row) : len(row) + gap] + span
        return row[: self.size]

    def lists(self) -> list[int]:
        how = self._of(wordings.TRAINING_LISTS)
        pairs = [(name, self._value()) for name in self._names(int(self.draw.integers(8, 25)))]
        row: list[int] = []
        there = 0
        for name, value in pairs:
            line = self._read(how.format(name=name, value=value))
            if there and len(row) + len(line) > self.size // 2:
                break
            row += line
            there += 1
        row += self._text()[: int(self.draw.choice((0, 20, 100)))]
        while len(row) < self.size:
            name, value = pairs[self.draw.integers(there)]
            row += self._read(how.format(name=name, value=value))
        return row[: self.size]

    @property
    def size(self) -> int:
        return self.text.shape[1]

    def _text(self) -> list[int]:
        """A window of training text."""
        return self.text[self.draw.integers(len(self.text))].tolist()

    def _read(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _of(self, some: Any) -> Any:
        return some[self.draw.integers(len(some))]

    def _names(self, count: int) -> list[str]:
        nouns = self.draw.permutation(wordings.TRAINING_NOUNS)[:count].tolist()
        if self.draw.random() < 0.5:
            return nouns
        return [f"{self._of(wordings.TRAINING_ADJECTIVES)} {noun}" for noun in nouns]

    def _value(self) -> str:
        kind = self.draw.random()
        if kind < 0.7:
            digits = int(self.draw.integers(3, 8))
            return str(self.draw.integers(10 ** (digits - 1), 10**digits))
        if kind < 0.85:
            return f"{self._of(wordings.TRAINING_ADJECTIVES)} {self._of(wordings.TRAINING_NOUNS)}"
        return "".join(self._of(LETTERS) for _ in range(self.draw.integers(3, 6)))
