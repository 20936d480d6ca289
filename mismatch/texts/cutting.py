"""One document as windows, in a seeded order from anywhere in it; tokenised when first asked for and no further.

A text of up to `LONG` characters is tokenised whole. A longer one is tokenised in pieces of `PIECE` characters, each
when a window is taken from it: the cost of a few windows does not grow with the length of a document. A piece ends in
front of a space where there is one, so that its tokens are those of the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mismatch.texts.contents import Content, size
from mismatch.texts.tokens import encode

LONG = 2**20
"""Characters up to which a text is tokenised whole."""
PIECE = 2**18
"""Characters of a piece of a longer one."""


class Window(NamedTuple):
    """A piece of a document: ids `body`, bool `body` (the predictions that count) or None for all, and the tokens of
    the document in front of it."""

    ids: np.ndarray
    scored: np.ndarray | None
    offset: int


class Cutter:
    """The windows of one document, one after the other.

    Args:
        content: of the document.
        name: of the document, for errors.
        tokenizer: a transformers tokenizer.
        prefix: what it puts before a text. Where the text begins with it, it stands there once.
        body: tokens of a window without the prefix.
        seed: of the order.
        answers: only predictions of answers count; windows without any are left out.

    Attributes:
        tokens: of the parts that were tokenised; 0 where a short text was not.
    """

    def __init__(
        self,
        content: Content,
        name: str,
        tokenizer: Any,
        prefix: tuple[int, ...],
        body: int,
        seed: Any,
        answers: bool = False,
    ) -> None:
        self.content, self.name, self.tokenizer = content, name, tokenizer
        self.prefix, self.body, self.answers = prefix, body, answers
        self.tokens = 0
        self._windows = self._in_order(np.random.default_rng(seed))

    def next(self) -> Window | None:
        """Another window; None: there is no more."""
        return next(self._windows, None)

    @property
    def bound(self) -> int:
        """Its tokens, or more: the bytes of a text that was too short to be tokenised."""
        return self.tokens or size(self.content)

    def measure(self) -> int:
        """Its tokens."""
        if not self.tokens:
            self.tokens = len(encode(self.content, self.name, self.tokenizer)[0])
        return self.tokens

    def _in_order(self, draw: np.random.Generator) -> Iterator[Window]:
        """A window of each piece in turn; pieces, and the windows of each, are shuffled."""
        if isinstance(self.content, str) and len(self.content.encode()) + 1 < self.body:
            return  # a token has a byte at least: too short, and there may be a million of these
        pieces = [*_pieces(self.content, 64 * self.body)]
        left: dict[int, list[Window]] = {}
        order = draw.permutation(len(pieces)).tolist()
        while order:
            for at in order:
                if at not in left:
                    left[at] = self._cut(draw, *pieces[at])
                if left[at]:
                    yield left[at].pop()
            order = [at for at in order if left[at]]

    def _cut(self, draw: np.random.Generator, start: int, piece: Content) -> list[Window]:
        ids, scored = encode(piece, self.name, self.tokenizer, answers=self.answers)
        self.tokens += len(ids)
        opening = len(self.prefix)
        while not start and opening and tuple(ids[:opening].tolist()) == self.prefix:
            ids, scored = ids[opening:], None if scored is None else scored[opening:]
        if start and isinstance(piece, str):
            ids = ids[: len(piece)]  # keeps the offsets of the pieces in order
        found = []
        for at in draw.permutation(len(ids) // self.body).tolist():
            part = slice(at * self.body, (at + 1) * self.body)
            counts = None if scored is None else scored[part]
            if counts is None or counts.any():
                found.append(Window(ids[part], counts, start + at * self.body))
        return found


def _pieces(content: Content, least: int) -> Iterator[tuple[int, Content]]:
    """Where each piece begins, and what it holds."""
    if not isinstance(content, str) or len(content) <= LONG:
        yield 0, content
        return
    start = 0
    while start < len(content):
        end = start + max(PIECE, least)
        space = re.compile(r"\s").search(content, end, end + 1000)
        end = end if space is None else space.start()
        yield start, content[start:end]
        start = end
