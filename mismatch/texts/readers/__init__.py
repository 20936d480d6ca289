"""Files as documents: one reader for each kind of file, by its suffix; any of them compressed.

| suffix | documents | reader |
|---|---|---|
| .txt .md | the file | `plain` |
| .jsonl .csv .tsv .parquet | one a row | `rows` |
| .npy .bin | token ids: a row of the array, or the parts between ends of text | `ids` |
| .gz .zst behind any of these | the same | gzip, pyarrow |
| a folder that `datasets` saved, `hf:NAME` | one a row | `hub` |

A reader is a function of an open file (binary), what to call it in errors, and what was asked: it yields the name of
each document within the file, and what it holds.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from mismatch.errors import DataError
from mismatch.texts.contents import Content
from mismatch.texts.readers import ids, plain, rows
from mismatch.texts.readers.asked import Asked

Reader = Callable[[BinaryIO, str, Asked], Iterator[tuple[str, Content]]]

READERS: dict[str, Reader] = {
    ".txt": plain.read,
    ".md": plain.read,
    ".jsonl": rows.json_lines,
    ".csv": rows.comma_separated,
    ".tsv": rows.tab_separated,
    ".parquet": rows.parquet,
    ".npy": ids.array,
    ".bin": ids.raw,
}
COMPRESSED = (".gz", ".zst")
ROWS = (".jsonl", ".csv", ".tsv", ".parquet")
SEEKING = (".parquet", ".npy", ".bin")
"""Kinds that are not read from front to back."""
KINDS = f"{', '.join(READERS)}; and each of them with {' or '.join(COMPRESSED)}"


def kind(path: Path) -> str | None:
    """The suffix that says how a file is read; None: it is not."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def read(path: Path, name: str, asked: Asked) -> Iterator[tuple[str, Content]]:
    """The documents of one file, each with its name.

    Raises:
        DataError: no ordinary file, of another kind, or broken.
    """
    suffix = kind(path)
    if suffix is None:
        raise DataError(
            f"{path} is a {path.suffix or 'file without suffix'}; text is read from: {KINDS}",
            hint='write it as .txt, or as .jsonl with one {"text": ...} a line',
        )
    with opened(path, suffix) as stream:
        for part, content in READERS[suffix](stream, str(path), asked):
            yield name + part, content


@contextmanager
def opened(path: Path, suffix: str) -> Iterator[BinaryIO]:
    """A file, decompressed where its name says so.

    Raises:
        DataError: it cannot be opened or is broken.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(
                f"{path} is no ordinary file (a pipe or a device)",
                hint="hand a stream over as standard input: ... | mismatch ... --data -",
            )
        with _unpacked(path) as stream:
            packed = path.suffix.lower() in COMPRESSED
            seek = packed and suffix in SEEKING
            yield io.BytesIO(plain.bounded(stream, str(path))) if seek else stream
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        said = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {said}") from error


@contextmanager
def _unpacked(path: Path) -> Iterator[BinaryIO]:
    if path.suffix.lower() == ".gz":
        with gzip.open(path) as stream:
            yield cast(BinaryIO, stream)
    elif path.suffix.lower() == ".zst":
        with pa.input_stream(str(path), compression="zstd") as frames:
            yield io.BufferedReader(_Raw(frames), 2**20)
    else:
        with open(path, "rb") as file:
            yield file


class _Raw(io.RawIOBase):
    """pyarrow's stream as the standard library wants one below a buffer."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
