"""Rows with a column of text, of chat messages, or of token ids: .jsonl, .csv, .tsv, .parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import pyarrow as pa

from mismatch.errors import DataError
from mismatch.texts.contents import Content, as_content
from mismatch.texts.readers import plain
from mismatch.texts.readers.asked import Asked

FIELDS = ("text", "messages", "conversations", "input_ids")
"""Columns that are taken when none is named: the first that is there."""
BATCH = 256
"""Rows that are held at once."""


def content_of(row: Any, where: str, asked: Asked) -> Content:
    """What a row holds.

    Raises:
        DataError: it has no such column, or something else in it.
    """
    if not isinstance(row, Mapping):
        raise DataError(
            f"{where} is a {type(row).__name__}, not a row with names",
            hint='each line is a JSON object such as {"text": "..."}',
        )
    field = field_of(row, where, asked)
    value = row[field]
    if field in ("messages", "conversations") and isinstance(value, str):
        raise DataError(
            f"{where}: `{field}` is text, not a list of messages",
            hint="write the rows as .jsonl or .parquet, where messages stay messages",
        )
    return as_content(value, f"{where}, `{field}`")


def field_of(columns: Iterable[str], where: str, asked: Asked) -> str:
    """The column that holds the text.

    Raises:
        DataError: there is none.
    """
    there = list(columns)
    wanted = FIELDS if asked.field is None else (asked.field,)
    for field in wanted:
        if field in there:
            return field
    raise DataError(
        f"{where} has no `{'`, `'.join(wanted)}`; it has: {', '.join(map(str, there)) or 'nothing'}",
        hint="name the one that holds the text: --text-field NAME",
    )


def json_lines(stream: BinaryIO, where: str, asked: Asked) -> Iterator[tuple[str, Content]]:
    """One JSON object a line."""
    for number, line in plain.lines(stream, where):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}, line {number} is not JSON: {error}") from error
        yield f":{number}", content_of(row, f"{where}, line {number}", asked)


def comma_separated(stream: BinaryIO, where: str, asked: Asked) -> Iterator[tuple[str, Content]]:
    """One document a row; the first row names the columns."""
    return _separated(stream, where, asked, ",")


def tab_separated(stream: BinaryIO, where: str, asked: Asked) -> Iterator[tuple[str, Content]]:
    return _separated(stream, where, asked, "\t")


def _separated(
    stream: BinaryIO, where: str, asked: Asked, sep: str
) -> Iterator[tuple[str, Content]]:
    import pandas as pd

    try:
        with plain.as_text(stream) as text:
            table = pd.read_csv(
                text,
                sep=sep,
                dtype=str,
                keep_default_na=False,
                chunksize=BATCH,
                encoding_errors="strict",
            )
            for chunk in table:
                field = field_of(chunk.columns, where, asked)
                for at, value in chunk[field].items():
                    yield f":{at + 1}", content_of({field: value}, f"{where}, row {at + 1}", asked)
    except ValueError as error:  # pandas' own errors and Unicode's
        raise DataError(f"{where} is no table that can be read: {error}") from error


def parquet(stream: BinaryIO, where: str, asked: Asked) -> Iterator[tuple[str, Content]]:
    """One document a row; only the column of the text is read."""
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(stream)
        field = field_of(file.schema_arrow.names, where, asked)
        at = 0
        for batch in file.iter_batches(BATCH, columns=[field]):
            for row in batch.to_pylist():
                at += 1
                yield f":{at}", content_of(row, f"{where}, row {at}", asked)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where} is no parquet file that can be read: {error}") from error
