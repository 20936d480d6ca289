"""Plain text: UTF-8, or what a byte order mark says."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mismatch.errors import DataError
from mismatch.texts.contents import Content, checked
from mismatch.texts.readers.asked import LIMIT, Asked

MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # in front of UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read(stream: BinaryIO, where: str, _asked: Asked) -> Iterator[tuple[str, Content]]:
    """The whole file is one document."""
    data = bounded(stream, where)
    try:
        text = data.decode(_encoding(data[:4]))
    except UnicodeDecodeError as error:
        raise _undecoded(where, "", data, error) from error
    yield "", checked(text.replace("\r\n", "\n"), where)


def bounded(stream: BinaryIO, where: str) -> bytes:
    """All bytes of a stream.

    Raises:
        DataError: more than `LIMIT`.
    """
    data = stream.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise DataError(
            f"{where} holds more than {LIMIT >> 20} MB in one piece",
            hint="give it as documents, such as .jsonl with one a line, or a part of it",
        )
    return data


def lines(stream: BinaryIO, where: str) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers.

    Raises:
        DataError: a line that is too long or cannot be decoded.
    """
    number = 0
    with as_text(stream) as text:
        while True:
            number += 1
            try:
                line = text.readline(LIMIT)
            except UnicodeDecodeError as error:
                raise _undecoded(
                    where, f", line {number} or behind", error.object, error
                ) from error
            if not line:
                return
            if len(line) == LIMIT:
                raise DataError(f"{where}, line {number} is longer than {LIMIT >> 20} MB")
            if line.strip():
                yield number, line


@contextmanager
def as_text(stream: BinaryIO) -> Iterator[io.TextIOWrapper]:
    """A stream decoded; lines end at line feeds alone, for others may stand in a text."""
    buffered: Any = stream if hasattr(stream, "peek") else io.BufferedReader(stream)
    text = io.TextIOWrapper(buffered, _encoding(buffered.peek(4)[:4]), newline="\n")
    try:
        yield text
    finally:
        text.detach()  # whoever opened the stream closes it


def _encoding(start: bytes) -> str:
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8-sig")


def _undecoded(where: str, place: str, data: bytes, error: UnicodeDecodeError) -> DataError:
    name = "UTF-8" if error.encoding.startswith("utf-8") else error.encoding.upper()
    utf16 = data[:1000].count(0) > 100
    guess = "UTF-16LE" if utf16 else "LATIN1"
    return DataError(
        f"{where}{place} is not {name}: byte {error.start} is 0x{data[error.start]:02x}",
        hint=f"convert it: iconv -f {guess} -t UTF-8 {Path(where).name} (if that is what it is)",
    )
