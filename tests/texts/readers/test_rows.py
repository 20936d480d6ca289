"""Rows of every kind of file: the same documents from each, whatever compresses it, and what is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mismatch.errors import DataError
from mismatch.texts import documents as data
from mismatch.texts.contents import Chat, TokenIds

ROWS = {"id": ["1", "2"], "text": ["one, two", 'line\nline "quoted"']}


def jsonl(path: Path, rows: dict[str, list]) -> None:
    lines = (dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def csv(path: Path, rows: dict[str, list]) -> None:
    pd.DataFrame(rows).to_csv(path, index=False)


def tsv(path: Path, rows: dict[str, list]) -> None:
    pd.DataFrame(rows).to_csv(path, index=False, sep="\t")


def parquet(path: Path, rows: dict[str, list]) -> None:
    pq.write_table(pa.table(rows), path)


WRITERS: dict[str, Callable] = {"jsonl": jsonl, "csv": csv, "tsv": tsv, "parquet": parquet}


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_gives_the_same_documents(tmp_path, kind, packed):
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path, ROWS)
    if packed:
        content = path.read_bytes()
        path.unlink()
        path = path.with_name(path.name + packed)
        if packed == ".gz":
            path.write_bytes(
                gzip.compress(content[:30]) + gzip.compress(content[30:])
            )  # two members
        else:
            with pa.output_stream(str(path), compression="zstd") as stream:
                stream.write(content)
    found = data.read(path)
    assert found.texts == tuple(ROWS["text"])
    assert found.names == (f"{path.name}:1", f"{path.name}:2")
    assert data.read(path, field="id").texts == ("1", "2")
    assert (
        found.hashes == data.read(ROWS["text"]).hashes
    )  # so that texts of two roles are kept apart
    with pytest.raises(DataError, match=r"has no `body`; it has: id, text") as error:
        data.read(path, field="body")
    assert "--text-field" in error.value.hint


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_of_messages_is_chats_and_one_of_numbers_is_token_ids(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    rows = {"conversations": [shared], "input_ids": [[3, 1, 2]], "messages": [said]}
    WRITERS[kind](path, rows)
    assert data.read(path).texts == (Chat(tuple(said)),)  # messages are the first that is there
    assert data.read(path, field="conversations").texts == (Chat(tuple(said)),)
    (ids,) = data.read(path, field="input_ids").texts
    assert isinstance(ids, TokenIds)
    assert ids.ids.tolist() == [3, 1, 2]


def test_null_rows_are_empty(tmp_path):
    parquet(tmp_path / "a.parquet", {"text": ["one", None, "two"]})
    assert data.read(tmp_path / "a.parquet").names == ("a.parquet:1", "a.parquet:3")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": "hi"}', "`messages` is text, not a list of messages"),
        ('{"messages": [{"content": "hi"}]}', "a message has no role; it has: content"),
        ('{"text": 3}', "`text` is a int: neither text"),
        ('{"text": ["a", "b"]}', "`text` is a list: neither text"),
        ('{"input_ids": [1, -2]}', "holds the token id -2"),
        ('{"input_ids": [1, 99999999999999999999]}', "must be one row of whole numbers"),
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "line 1 is not JSON"),
    ],
)
def test_what_a_row_cannot_hold(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=said) as error:
        data.read(tmp_path / "a.jsonl")
    assert "line 1" in error.value.message


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.tsv", "a.jsonl", "a.parquet.gz"])
@pytest.mark.parametrize("content", [b"", b"PAR1PAR1", b"\x00\x01\xff\xfe", b'a,b\n"open'])
def test_broken_tables_are_errors_of_ours(tmp_path, name, content):
    content = gzip.compress(content) if name.endswith(".gz") else content
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError):
        data.read(tmp_path / name)


def test_a_long_quoted_field_is_one_text(tmp_path):
    csv(tmp_path / "a.csv", {"text": ["word " * 100_000]})
    assert len(data.read(tmp_path / "a.csv").texts[0]) == 500_000
