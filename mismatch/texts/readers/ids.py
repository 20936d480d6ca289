"""Token ids that were made elsewhere: .npy, and .bin as nanoGPT and llm.c write it.

One stream of ids holds many documents with the end of text between them (in llm.c in front of each): it is divided
there, and the mark itself is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from mismatch.errors import DataError
from mismatch.texts.contents import Content, token_ids
from mismatch.texts.readers import plain
from mismatch.texts.readers.asked import Asked

LLM_C = 20240520
"""The first of the 256 int32 in front of the ids of llm.c."""
HEADER = 1024
"""Bytes of it."""


def array(stream: BinaryIO, where: str, asked: Asked) -> Iterator[tuple[str, Content]]:
    """An array of one axis is a stream of documents; one of two axes has a document in each row."""
    try:
        found = np.load(stream, allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError, TypeError) as error:
        raise DataError(f"{where} is no array of numbers: {error}") from error
    if (
        not isinstance(found, np.ndarray)
        or found.ndim not in (1, 2)
        or found.dtype.kind not in "iu"
    ):
        got = (
            f"{found.dtype} of shape {found.shape}" if isinstance(found, np.ndarray) else "several"
        )
        raise DataError(
            f"{where}: token ids are whole numbers of one or two axes, got {got}",
            hint="one axis: a stream of documents; two: a document in each row",
        )
    if found.ndim == 2:
        for at, row in enumerate(found, 1):
            yield f":{at}", token_ids(row, f"{where}, row {at}")
    else:
        yield from divided(found, where, asked)


def raw(stream: BinaryIO, where: str, asked: Asked) -> Iterator[tuple[str, Content]]:
    """Numbers of 16 or 32 bits: whichever makes them all ids of the tokenizer."""
    if asked.tokenizer is None:
        raise DataError(
            f"{where}: the token ids of a .bin cannot be read without the model's tokenizer",
            hint='hand it over: read_documents("tokens.bin", tokenizer=tokenizer)',
        )
    data = plain.bounded(stream, where)
    if data[:4] == np.array([LLM_C], "<i4").tobytes():
        data = data[HEADER:]
    known = len(asked.tokenizer)
    for dtype in ("<u4", "<u2"):
        if data and not len(data) % int(dtype[-1]):
            ids = np.frombuffer(data, dtype)
            if ids.max() < known:
                yield from divided(ids, where, asked)
                return
    raise DataError(
        f"{where} holds no token ids of this model: neither as uint16 nor as uint32 are all below {known}",
        hint="token ids must be made by the tokenizer of --model",
    )


def divided(ids: np.ndarray, where: str, asked: Asked) -> Iterator[tuple[str, Content]]:
    """The documents of one stream."""
    end = getattr(asked.tokenizer, "eos_token_id", None)
    borders = [] if end is None else np.flatnonzero(ids == end).tolist()
    start = 0
    for at, border in enumerate([*borders, len(ids)], 1):
        yield f":{at}" if borders else "", token_ids(ids[start:border], where)
        start = border + 1
