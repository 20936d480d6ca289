"""What is told of the texts behind a run: how much there was, what was asked for, what was left out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import synthetic as s

from mismatch.report.sections import state
from mismatch.report.words import text_line, text_lines

WHOLE = {
    "source": "wiki",
    "documents": 8,
    "documents_read": 105,
    "documents_seen": 8,
    "left_out": 0,
    "copies": 0,
    "more": 0,
    "revision": "",
    "seq_len": 1024,
    "tokens": 8192,
    "asked": 8192,
    "scored": 8192,
}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, "wiki, 8 of 105 documents, 8,192 tokens"),
        (
            {"asked": 8500},
            "wiki, 8 of 105 documents, 8,192 tokens",
        ),  # not one window less than asked
        (
            {"asked": 10_000_000, "tokens": 62_208, "scored": 62_208},
            "wiki, 8 of 105 documents, 62,208 of 10,000,000 tokens asked",
        ),
        (
            {
                "documents": 2,
                "documents_read": 5002,
                "documents_seen": 5002,
                "left_out": 5000,
                "copies": 3,
            },
            "wiki, 2 of 5,002 documents, 8,192 tokens, 5,000 of 5,002 documents looked at fill no window of 1024 "
            "tokens, copies left out: 3",
        ),
        (
            {"more": 2**28, "revision": "abc", "scored": 700},
            "wiki, 8 of 105 documents, 8,192 tokens, of which 700 predict an answer and count, what is behind the "
            "first 256 MB was not read, revision abc",
        ),
    ],
)
def test_one_line(changed, told):
    assert text_line(WHOLE | changed) == told


def run(**changed: object) -> SimpleNamespace:
    texts = {"evaluation": WHOLE | changed}
    return SimpleNamespace(manifest={"status": "done", "texts": texts}, table=s.synthetic())


def test_runs_of_before_have_less_to_tell():
    old = {"source": "wiki", "documents": 8, "windows": 8, "tokens": 8192}
    manifest = {"status": "done", "texts": {"evaluation": old}}
    found = SimpleNamespace(manifest=manifest, table=s.synthetic())
    assert text_lines(found) == ["evaluation: wiki, 8 of 8 documents, 8,192 tokens"]
    assert str(state(found)) == ""
    assert text_lines(SimpleNamespace(manifest={})) == []


def test_a_report_warns_where_there_was_less_text_than_one_would_think():
    assert "warning" not in str(state(run()))
    assert "8,192 of 10,000 tokens asked" in str(state(run(asked=10_000)))
    assert "fill no window" in str(state(run(documents_seen=5002, left_out=5000)))
