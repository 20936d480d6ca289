"""Documents from every kind of source, the errors of each, and two sets that never overlap."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mismatch.errors import DataError
from mismatch.texts import documents as data
from mismatch.texts.demo import fetch
from mismatch.texts.documents import Documents


def failed(source: object, match: str) -> DataError:
    with pytest.raises(DataError, match=match) as error:
        data.read(source)
    assert error.value.exit_code == 2
    return error.value


# sources


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo — three".encode())
    found = data.read(path)
    assert found.texts == ("one\ntwo — three",)
    assert found.names == ("a.txt",)
    assert found.source == str(path)


def test_jsonl_is_one_document_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "one\u2028same", "id": 1}), "", json.dumps({"text": "two"})]
    path.write_text("\n".join(lines))
    found = data.read(str(path))
    assert found.texts == ("one\u2028same", "two")
    assert found.names == ("a.jsonl:1", "a.jsonl:3")  # line numbers


def test_a_folder_is_read_in_name_order_and_only_text_in_it(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.txt").write_text("b")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "SOURCE.json").write_text("{}")
    found = data.read(tmp_path)
    assert dict(zip(found.names, found.texts, strict=True)) == {"a.jsonl:1": "a", "sub/b.txt": "b"}


def test_strings(tmp_path):
    found = data.read(["one", "two"])
    assert found.texts == ("one", "two")
    assert len(found) == 2
    assert data.read(found) is found


def test_empty_documents_are_left_out():
    assert data.read(["one", "  \n", None, float("nan"), "two"]).names == ("text 0", "text 4")


def test_a_copy_of_a_document_is_no_second_one(tmp_path):
    found = data.read(["one", "two", "one", " ", "one"])
    assert found.texts == ("one", "two")
    assert found.copies == 2
    assert data.read(Documents("own", ("a", "b"), ("x", "x"))).names == ("a",)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same")
    assert data.read(tmp_path).names == ("a.txt",)


@pytest.mark.parametrize(
    "given",
    [
        (text for text in ("one", "two")),
        pd.Series(["one", "two"]),
        np.array(["one", "two"]),
        np.array(["one", "two"], dtype=object),
        pd.DataFrame({"text": ["one", "two"], "id": [1, 2]}),
        [{"text": "one"}, {"text": "two"}],
    ],
    ids=["generator", "series", "array", "objects", "frame", "rows"],
)
def test_what_python_holds_text_in(given):
    found = data.read(given)
    assert found.texts == ("one", "two")
    assert {type(text) for text in found.texts} == {str}


def test_paths_in_a_list(tmp_path):
    (tmp_path / "a.TXT").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}')
    assert data.read([tmp_path / "a.TXT", tmp_path / "b.jsonl"]).texts == ("one", "two")
    assert data.read(tmp_path / "a.TXT").texts == ("one",)


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_not_the_folder_that_one_stands_in(name, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text " * 50)
    monkeypatch.chdir(tmp_path)
    failed(name, "no text is named")
    assert len(data.read(".")) == 1


def test_hidden_files_and_checkpoints_are_not_read(tmp_path):
    for name in ("a.txt", ".hidden.txt", ".ipynb_checkpoints/a-checkpoint.txt", ".git/x.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert data.read(tmp_path).names == ("a.txt",)


def test_the_card_beside_the_rows_of_a_data_set_is_no_document(tmp_path):
    (tmp_path / "README.md").write_text("card")
    assert data.read(tmp_path).texts == ("card",)
    (tmp_path / "a.jsonl").write_text('{"text": "row"}')
    assert data.read(tmp_path).texts == ("row",)


@pytest.mark.parametrize(
    ("piped", "texts"),
    [
        (b"one text\nof two lines", ("one text\nof two lines",)),
        (b'{"text": "a"}\n{"text": "b"}\n', ("a", "b")),
        (b"{ no json\n", ("{ no json\n",)),
    ],
)
def test_standard_input(monkeypatch, piped, texts):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped)))
    data._piped.cache_clear()
    assert data.read("-").texts == texts
    assert data.read("-").source == "standard input"  # again, though it is gone
    data._piped.cache_clear()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.txt")
    assert "--data -" in failed(tmp_path / "fifo.txt", "no ordinary file").hint
    failed("/dev/zero", "is a file without suffix")


@pytest.mark.parametrize(
    "name",
    ["~nobody-of-this-name/a.txt", "a" * 5000, "a\0b", "x/" * 3000],
    ids=["user", "long", "nul", "deep"],
)
def test_names_that_cannot_be(name):
    assert len(failed(name, "no text ").message) < 400


def test_a_source_is_read_up_to_a_limit_which_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "LIMIT", 100)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n:030}"}}\n' for n in range(9)))
    found = data.read(tmp_path / "a.jsonl")
    assert len(found) == 3
    assert found.more == 100
    assert not data.read(["one"]).more


@pytest.fixture
def speeches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`sotu` in the cache with four short speeches."""
    folder = tmp_path / "cache/sotu"
    folder.mkdir(parents=True)
    for name in ("1790-A-1", "1944-B-1", "1945-B-2", "2020-C-1"):
        (folder / f"{name}.txt").write_text(f"speech {name}")
    package = fetch.SOURCES["sotu"]
    keys = {"data_sha256": package.data_sha256, "format": package.format}
    (folder / "SOURCE.json").write_text(json.dumps(keys))
    monkeypatch.setenv("MISMATCH_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.mark.parametrize(
    ("name", "years"),
    [
        ("sotu", ["1790", "1944"]),
        ("sotu:early", ["1790", "1944"]),
        ("sotu:late", ["1945", "2020"]),
        ("sotu:all", ["1790", "1944", "1945", "2020"]),
    ],
)
def test_parts_of_sotu(speeches, name, years):
    found = data.read(name)
    assert [n[:4] for n in found.names] == years
    assert found.source == (name if ":" in name else "sotu:early")
    assert "State of the Union" in found.note


def test_an_unknown_part(speeches):
    failed("sotu:middle", "sotu has no part 'middle'; parts: sotu:early, sotu:late, sotu:all")


# errors


@pytest.mark.usefixtures("speeches")
def test_a_name_that_was_not_fetched_names_the_command():
    assert "mismatch fetch wiki" in failed("wiki", "the text wiki is not here yet").hint


@pytest.mark.parametrize(("name", "hint"), [("wikki", "did you mean `wiki`?"), ("x.txt", "check")])
def test_missing(name, hint):
    assert hint in failed(name, f"no text {name}: neither a file or folder nor one of").hint


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    failed(tmp_path / "a.txt", "holds no text")
    failed([content], "strings holds no text")
    failed([], "strings holds no text")


def test_not_utf8_names_file_and_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"na\xefve caf\xe9")
    assert "iconv" in failed(path, r"latin.txt is not UTF-8: byte 2 is 0xef").hint


def test_jsonl_errors_name_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ok"}\n{"text": \n')
    failed(path, "line 2 is not JSON")
    path.write_text('{"text": "ok"}\n\n{"body": "x", "id": 3}\n')
    missing = failed(path, "line 3 has no `text`, `messages`, .*; it has: body, id")
    assert "--text-field" in missing.hint
    path.write_text('["text"]\n')
    failed(path, "line 1 is a list, not a row with names")


def test_a_folder_without_text_and_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    failed(tmp_path, r"holds no text; it is read from: \.txt, \.md, \.jsonl")
    assert "jsonl" in failed(tmp_path / "a.docx", r"is a \.docx; text is read from: \.txt").hint


def test_something_that_is_no_text():
    failed([1, 2], "document 0 is a int: neither text, nor messages, nor token ids")
    failed({"train": ["a"]}, "text is a path or name, or a list of documents; got a dict")
    failed(b"text", "got a bytes")
    failed(7, "got a int")


# two disjoint sets

MANY = tuple(f"document number {i}" for i in range(200))


def test_one_source_is_divided_by_hash():
    first, second = data.calibration_and_evaluation(MANY, MANY)
    assert len(first) + len(second) == 200
    assert not set(first.texts) & set(second.texts)
    assert 20 < len(first) < 60  # a fifth
    assert first.source == "strings:calibration"
    assert second.source == "strings:evaluation"
    shuffled, _ = data.calibration_and_evaluation(MANY[::-1], MANY[::-1])
    assert set(shuffled.texts) == set(first.texts)  # order does not matter
    fewer, _ = data.split(data.read(MANY[:50]))
    assert set(fewer.texts) <= set(first.texts)  # nor does what else is in the set


def test_the_same_text_twice_falls_on_one_side():
    first, second = data.split(data.read(MANY + MANY))
    assert not set(first.texts) & set(second.texts)


@pytest.mark.parametrize("texts", [("a", "b"), ("c", "d", "e")])
def test_a_small_set_leaves_neither_side_empty(texts):
    first, second = data.split(data.read(list(texts)))
    assert len(first) >= 1
    assert len(second) >= 1


def test_one_document_cannot_be_divided():
    with pytest.raises(DataError, match="is one document"):
        data.calibration_and_evaluation(["a"], ["a"])


def test_different_sources_are_taken_as_they_are(speeches):
    first, second = data.calibration_and_evaluation("sotu", ["something else"])
    assert first.source == "sotu:early"
    assert second.texts == ("something else",)


def test_a_shared_text_is_found_under_another_name():
    a = Documents("A", ("x", "y"), ("one", "two"))
    b = Documents("B", ("p", "q"), ("three", "two"))
    with pytest.raises(
        DataError, match=r"\(A\) and evaluation \(B\) share 1 document, .*'y' = 'q'"
    ):
        data.calibration_and_evaluation(a, b)
    data.assert_disjoint(a, Documents("C", ("x",), ("three",)))


def test_the_fingerprint_sees_text_and_order_and_not_names():
    a = Documents("A", ("x", "y"), ("one", "two"))
    assert a.fingerprint == Documents("B", ("p", "q"), ("one", "two")).fingerprint
    assert a.fingerprint != Documents("A", ("x", "y"), ("two", "one")).fingerprint
    assert a.fingerprint != Documents("A", ("x", "y"), ("one", "two.")).fingerprint
