"""One place names intervals, and says that there is none; a text in one file, from the table to the terminal."""

from __future__ import annotations

import io
import json

import pyarrow.parquet as pq
import pytest
from wonderland import documents, jsonl

import mismatch
from mismatch import cli
from mismatch.report import intervals
from mismatch.runs.intervals import BLOCKS, DOCUMENTS, FORMER, SAMPLES
from mismatch.runs.table import as_table, from_parquet, to_parquet
from mismatch.stages.scan.words import scan_summary
from mismatch.stages.trace.report.controls_figure import output_shift

NOTHING = float("nan")
WHY = "no interval: that takes 4 documents, or 8 windows of fewer"


def test_words():
    assert intervals.named(["documents", "", "documents"]) == "95 % interval over documents"
    assert intervals.named([BLOCKS]) == (
        "95 % interval over moving blocks of windows of fewer than 4 documents"
    )
    assert intervals.named([DOCUMENTS, SAMPLES]) == "95 % interval over documents and samples"
    assert intervals.named(["", ""]) == WHY
    assert intervals.band(0.5, NOTHING) == "no interval"
    assert intervals.band(0.5, 0.61, "{:.1f}".format) == "[0.5, 0.6]"
    assert intervals.said(0.0373, NOTHING, NOTHING) == "0.0373 (no interval)"
    assert intervals.said(0.0373, 0.03, 0.05) == "0.0373 [0.0300, 0.0500]"


@pytest.mark.parametrize(
    ("lo", "hi", "border", "said"),
    [
        *((0.1, 0.2, 0.0, "above"), (-0.2, -0.1, 0.0, "below"), (-0.1, 0.2, 0.0, "open")),
        *((0.1, 0.2, 0.3, "below"), (0.0, 0.0, 0.0, "open"), (NOTHING, NOTHING, 0.0, "none")),
    ],
)
def test_sides(lo, hi, border, said):
    assert intervals.side(lo, hi, border) == said


def rows_of(**more):
    base = {"run_id": "r", "mode": "free", "student": "swap", "site": "logits", "metric": "kl"}
    return [base | {"stat": "mean", "value": 0.5, "n": 9, "swapped": True} | more]


def test_the_table_says_what_an_interval_is_over():
    assert list(as_table(rows_of(lo=0.4, hi=0.6, over=BLOCKS))["over"]) == [BLOCKS]
    assert list(as_table(rows_of(over=DOCUMENTS))["over"]) == [""]  # there is none
    assert list(as_table(rows_of(lo=0.4, hi=0.6))["over"]) == [DOCUMENTS]


def test_a_table_of_before_says_that_its_intervals_are_of_before():
    now = pq.read_table(io.BytesIO(to_parquet(as_table(rows_of(lo=0.4, hi=0.6)))))
    pq.write_table(now.drop_columns("over"), stored := io.BytesIO())
    assert list(from_parquet(stored.getvalue())["over"]) == [FORMER]


# ---- one text in one file -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, words in (("long", 2000), ("short", 250)):
        (folder / f"{name}.txt").write_text(documents(1, words=words)[0])
    jsonl(folder / "three.jsonl", documents(3, words=100))
    jsonl(folder / "calibration.jsonl", documents(4, seed=1))
    return folder


def asked(stage, texts, data, *more):
    swap = ("--swap", "layer2:infini(segment=16)") if stage != "scan" else ()
    return [
        *(stage, "--model", "glassllm", *swap, "--data", str(texts / data), "--controls", "zero"),
        *("--calibration-data", str(texts / "calibration.jsonl"), "--seq-len", "32"),
        *more,
    ]


TRACE = ("--tokens", "512", "--metrics", "kl,nll")


def test_a_long_text_has_intervals_over_blocks_of_its_windows(texts, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main([*asked("trace", texts, "long.txt"), *TRACE, "--output", str(run)]) == 0
    said = capsys.readouterr().out
    assert "95 % interval over moving blocks of windows of fewer than 4 documents" in said
    table = mismatch.load_run(run).table
    at = table.query("metric == 'kl' and stat in ('mean', 'mean_minus_zero')")
    at = at[(at["position"] == "all") & (at["student"] != "floor")]
    assert len(at) == 3 and set(at["over"]) == {BLOCKS}
    assert (at["lo"] < at["value"]).all() and (at["value"] < at["hi"]).all()
    caption = " ".join(output_shift(table)._supxlabel.get_text().split())
    assert "whiskers: 95 % interval over moving blocks of windows" in caption


@pytest.mark.parametrize("data", ["short.txt", "three.jsonl"])
def test_too_little_text_has_no_interval_and_no_finding(texts, tmp_path, capsys, data):
    words = [*asked("trace", texts, data, "--tokens", "160"), "--metrics", "kl,nll"]
    assert cli.main([*words, "--output", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert f"output shift, nats per token; {WHY}" in said
    assert "too little text to judge it" in said
    assert "not told apart" not in said and "nan" not in said
    assert "MEDIUM" not in said and "HIGH" not in said


def test_a_scan_of_too_little_text_compares_nothing(texts, tmp_path, capsys):
    words = asked("scan", texts, "short.txt", "--tokens", "128", "--tasks", "text")
    assert cli.main([*words, "--swap", "nope", "--output", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert f"against zero: {WHY}" in said and "not told apart" not in said


def test_json_has_no_nan(texts, tmp_path, capsys):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    words = [*asked("trace", texts, "short.txt", "--tokens", "128"), "--metrics", "kl"]
    run = tmp_path / "run"
    assert cli.main([*words, "--output", str(run), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert '"kl_lo": null' in json.dumps(printed)
    for file in run.rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def test_a_scan_counts_what_has_no_interval():
    def cell(student, stat, value, lo, hi):
        known = {"stage": "scan", "layer": 0, "student": student, "stat": stat, "value": value}
        return rows_of(**known, lo=lo, hi=hi)[0]

    rows = [cell("a", "mean", 0.002, NOTHING, NOTHING), cell("zero", "mean", 4.1, NOTHING, NOTHING)]
    rows.append(cell("a", "mean_minus_zero", -4.098, NOTHING, NOTHING))
    assert f"against zero: {WHY}" in scan_summary(as_table(rows))
    rows.append({**rows[2], "layer": 1, "lo": -5.0, "hi": -3.0})
    assert "better in 1 layers, worse in 0, not told apart in 0, no interval in 1" in scan_summary(
        as_table(rows)
    )
