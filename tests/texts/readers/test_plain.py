"""Bytes that are text, in which encoding, and what is refused."""

from __future__ import annotations

import codecs
import gzip

import pytest

from mismatch.errors import DataError
from mismatch.texts import documents as data
from mismatch.texts.readers import plain

TEXT = "one\ntwo — three"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_the_byte_order_mark_is_read(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    assert data.read(tmp_path / "a.txt").texts == (TEXT,)
    (tmp_path / "a.jsonl").write_bytes('{"text": "—"}\n{"text": "two"}\n'.encode(encoding))
    assert data.read(tmp_path / "a.jsonl").texts == ("—", "two")
    (tmp_path / "a.csv").write_bytes("text,id\n—,1\n".encode(encoding))
    assert data.read(tmp_path / "a.csv").texts == ("—",)


def test_big_endian(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"))
    assert data.read(tmp_path / "a.txt").texts == (TEXT,)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.TXT", "a.Md", "a.txt.gz"])
def test_suffixes(tmp_path, name):
    write = gzip.open if name.endswith(".gz") else open
    with write(tmp_path / name, "wb") as file:
        file.write(TEXT.encode())
    assert data.read(tmp_path / name).texts == (TEXT,)
    assert data.read(tmp_path).texts == (TEXT,)


@pytest.mark.parametrize("source", ["file", "strings", "rows"], ids=["a file", "strings", "rows"])
def test_nuls_are_no_text(tmp_path, source):
    """UTF-16 without a mark decodes as UTF-8 with a NUL behind each letter, and would be traced without a word."""
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.replace("—", "-").encode("utf-16-le"))
    given = {"file": path, "strings": ["a\0b"], "rows": [{"text": "a\0b"}]}[source]
    with pytest.raises(DataError, match="holds NUL characters, the first at 1") as error:
        data.read(given)
    assert "iconv -f UTF-16LE" in error.value.hint


def test_the_hint_names_the_likely_encoding(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("naïve".encode("latin1"))
    with pytest.raises(DataError, match="is not UTF-8: byte 2 is 0xef") as error:
        data.read(path)
    assert "LATIN1" in error.value.hint
    path.write_bytes(("caf\u00e9 " * 200).encode("utf-16-le"))
    with pytest.raises(DataError, match="is not UTF-8: byte 6 is 0xe9") as error:
        data.read(path)
    assert "UTF-16LE" in error.value.hint
    path.write_bytes(codecs.BOM_UTF16_LE + b"a\0b")
    with pytest.raises(DataError, match="is not UTF-16"):
        data.read(path)


def test_half_a_character_is_refused():
    with pytest.raises(DataError, match="holds half a character"):
        data.read(["ok", "broken \ud800"])


def test_more_than_the_limit_in_one_piece_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(plain, "LIMIT", 1000)
    (tmp_path / "a.txt").write_text("x" * 1001)
    with pytest.raises(DataError, match="holds more than 0 MB in one piece"):
        data.read(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 1001 + '"}')
    with pytest.raises(DataError, match="line 1 is longer than"):
        data.read(tmp_path / "a.jsonl")
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"x" * 100_000, mtime=0))
    with pytest.raises(DataError, match="holds more than"):
        data.read(tmp_path / "bomb.txt.gz")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz"])
@pytest.mark.parametrize(
    "content", [b"no such thing", gzip.compress(b"text " * 1000, mtime=0)[:-20]]
)
def test_broken_compression_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        data.read(tmp_path / name)
