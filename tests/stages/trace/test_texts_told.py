"""A run says what its text was; whatever Python holds it in gives the same run."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from wonderland import documents, jsonl

import mismatch
from mismatch import cli
from mismatch.stages.reporting import page

SMALL = {"tokens": 256, "seq_len": 64, "controls": (), "metrics": ("kl",)}


@pytest.mark.pages
def test_short_documents_and_copies_are_told(toy_teacher):
    texts = [*(f"short {n}" for n in range(50)), *documents(2), *documents(1)]
    made = mismatch.trace(toy_teacher, "layer2:nope", data=texts, **SMALL)
    told = (
        "strings, 2 of 52 documents, 256 tokens, 50 of 52 documents looked at fill no window of 64 tokens, "
        "copies left out: 1"
    )
    assert made.summary().startswith(f"text    evaluation: {told}\n")
    text = made.run.manifest["texts"]["evaluation"]
    facts = {"documents": 2, "documents_read": 52, "left_out": 50, "copies": 1, "asked": 256}
    assert facts.items() <= text.items()
    assert made.as_dict()["texts"]["evaluation"] == text
    report = page(made.run)
    assert report.count(told) == 2  # as a warning, and among the texts


def test_both_numbers_where_more_was_asked_than_there_is(toy_folder, tmp_path, capsys):
    text = jsonl(tmp_path / "a.jsonl", documents(2))
    code = cli.main(
        [
            *("trace", "--model", str(toy_folder), "--swap", "layer2:nope", "--data", str(text)),
            *("--tokens", "10M", "--seq-len", "64", "--controls", "none", "--metrics", "kl"),
            *("--device", "cpu", "--output", str(tmp_path / "run"), "--json"),
        ]
    )
    assert code == 0
    out, err = capsys.readouterr()
    there = json.loads(out)["texts"]["evaluation"]["tokens"]
    assert f"{there:,} of 10,000,000 tokens asked" in err
    assert there < 10_000


def test_whatever_python_holds_text_in_is_the_same_run(toy_teacher, tmp_path):
    texts = documents(4)
    (tmp_path / "a.TXT").write_text(texts[0])
    given = [
        texts,
        tuple(texts),
        (text for text in texts),
        pd.Series(texts),
        np.array(texts),
        [{"text": text} for text in texts],
    ]
    found = [
        mismatch.trace(toy_teacher, "layer2:nope", data=data, **SMALL).run.manifest["texts"]
        for data in given
    ]
    assert len({json.dumps(one) for one in found}) == 1
    ids = [toy_teacher.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    same = mismatch.trace(toy_teacher, "layer2:nope", data=ids, **SMALL).run.manifest["texts"]
    assert same["evaluation"]["fingerprint"] == found[0]["evaluation"]["fingerprint"]
    by_path, by_name = (
        mismatch.trace(toy_teacher, "layer2:nope", data=data, **SMALL).run.manifest["texts"]
        for data in (tmp_path / "a.TXT", str(tmp_path / "a.TXT"))
    )
    assert by_path == by_name


def test_an_iterator_is_read_once_and_kept(toy_teacher):
    """Calibration and evaluation of one generator: what it gave is divided."""
    texts = (text for text in documents(12))
    made = mismatch.trace(toy_teacher, "layer2:zero", data=texts, **SMALL | {"controls": ("zero",)})
    assert made.run.manifest["texts"]["evaluation"]["documents"] == 4
