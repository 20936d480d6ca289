"""What does not count reaches no metric: of a trace, of a scan, from Python and from the command line."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
from measured import collector_of, cut, student_of
from random_models import build

import mismatch
from mismatch import cli, registry
from mismatch.errors import UsageError
from mismatch.runs.table import as_table
from mismatch.stages.scan.tasks import text_task
from mismatch.stages.trace.batches import measure

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} said: {{ m.content }}. {% endfor %}"
    "{% if add_generation_prompt %}assistant said: {% endif %}"
)


@pytest.fixture(scope="module")
def tables():
    """A trace of all tokens, of some, and of the others."""
    model, whole = build("llama"), cut(6)
    some = np.random.default_rng(0).random(whole.ids.shape) < 0.4
    found = []
    for scored in (np.ones_like(some), some, ~some):
        windows = dataclasses.replace(whole, scored=scored)
        students = [student_of(model, "layer1:infini(segment=8)")]
        collector = collector_of(model, students, windows)
        measure(collector.teacher, students, collector, windows, batch_size=4)
        rows = as_table([{**row, "run_id": "a"} for row in collector.rows()])
        found.append(rows[(rows["student"] == "swap") & (rows["position"] == "all")])
    return [*found, some]


KEY = ["mode", "layer", "site", "metric", "stat"]


def test_the_parts_of_a_text_add_up_to_the_whole(tables):
    """Of every mean over tokens: what counts and what does not are the whole text together."""
    every, some, others, _ = (t if isinstance(t, np.ndarray) else t.set_index(KEY) for t in tables)
    tried = set()
    for key, row in every.iterrows():
        metric, stat = key[-2:]
        state = registry.metrics().card(metric).facts.get("state")
        if (
            stat != "mean"
            or state == "moments"
            or metric.startswith("lens")
            or key not in some.index
        ):
            continue
        a, b = some.loc[[key]].iloc[0], others.loc[[key]].iloc[0]
        if a["n"] + b["n"] != row["n"]:
            continue
        together = (a["value"] * a["n"] + b["value"] * b["n"]) / row["n"]
        assert together == pytest.approx(row["value"], rel=1e-4, abs=1e-7), key
        tried.add(metric)
    assert {"kl", "nll", "rel_l2", "top1"} <= tried, tried


def test_no_metric_counts_more_tokens_than_count(tables):
    _, some, _, mask = tables
    counted = int(mask.sum())
    behind = some[some["layer"].isna() | (some["layer"] > 0)]
    assert (behind["n"] <= counted).all(), behind[behind["n"] > counted]
    assert set(some[some["metric"] == "kl"]["n"]) == {counted}


def test_a_scan_asks_for_what_counts_alone():
    windows = cut(6)
    some = np.random.default_rng(0).random(windows.ids.shape) < 0.4
    task = text_task(dataclasses.replace(windows, scored=some))
    assert (task.asked == some).all()


@pytest.fixture(scope="module")
def talking(toy):
    tokenizer = copy.deepcopy(toy.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return mismatch.load((toy.model, tokenizer))


def chats(count: int = 6, seed: int = 0) -> list[dict]:
    draw = np.random.default_rng(seed)
    words = ("Alice", "was", "very", "tired", "of", "sitting", "by", "her", "sister")
    return [
        {
            "conversations": [
                {"from": who, "value": " ".join(draw.choice(words, 12))}
                for who in ("human", "gpt") * 6
            ]
        }
        for _ in range(count)
    ]


def test_a_trace_of_chats(talking):
    shared = {"data": chats(), "tokens": 512, "seq_len": 64, "controls": (), "metrics": ("kl",)}
    every, answers = (
        mismatch.trace(talking, "layer2:nope", **shared, answers_only=only)
        for only in (False, True)
    )
    text = answers.run.manifest["texts"]["evaluation"]
    assert 0.2 < text["scored"] / text["tokens"] < 0.8
    assert "predict an answer and count" in answers.summary()
    kl = [
        r.table.query("metric == 'kl' and student == 'swap' and position == 'all'")
        for r in (every, answers)
    ]
    assert set(kl[0]["n"]) == {512}
    assert set(kl[1]["n"]) == {text["scored"]}
    assert kl[0]["value"].iloc[0] != kl[1]["value"].iloc[0]


def test_a_scan_of_chats(talking):
    found = mismatch.scan(
        talking, "nope", data=chats(), tokens=512, seq_len=64, scored=1.0, among="2",
        tasks=("text",), controls=(), answers_only=True,
    )  # fmt: skip
    text = found.run.manifest["texts"]["evaluation"]
    assert set(found.table.query("metric == 'kl' and position == 'all'")["n"]) == {text["scored"]}
    assert text["scored"] < text["tokens"]


def test_a_repair_of_chats_is_evaluated_on_answers(talking):
    done = mismatch.repair(
        talking, "layer2:nope", data=chats(14), train_data="sotu", tokens=256, val_tokens=128, seq_len=32,
        train_tokens=1024, stages=("closed-form",), self_generated=0, controls=(), probes=(), trace_tokens=128,
        max_minutes=None, answers_only=True,
    )  # fmt: skip
    texts = done.run.manifest["texts"]
    for role in ("evaluation", "validation"):
        assert 0 < texts[role]["scored"] < texts[role]["tokens"]
    assert texts["training"]["scored"] == texts["training"]["tokens"]
    kl = done.table.query(
        "metric == 'kl' and site == 'logits' and stat == 'mean' and position == 'all'"
    )
    assert texts["evaluation"]["scored"] in set(kl["n"])
    assert kl["n"].max() == texts["evaluation"]["scored"]


@pytest.mark.parametrize(
    "stage, why",
    [("probe", "a probe makes its own inputs"), ("diagnose", "its corrections are fitted to all")],
)
def test_stages_that_count_all_tokens_say_why(talking, stage, why, capsys):
    with pytest.raises(UsageError, match="has no setting `answers_only`") as caught:
        getattr(mismatch, stage)(talking, "layer2:nope", answers_only=True)
    assert f"`mismatch {stage}` counts all tokens: {why}" in caught.value.hint
    assert cli.main([stage, "--model", "glassllm", "--swap", "layer2:nope", "--answers-only"]) == 2
    assert f"counts all tokens: {why}" in capsys.readouterr().err


def test_such_a_trace_is_no_start_for_a_stage_that_counts_all_tokens(talking, tmp_path, capsys):
    mismatch.trace(
        talking, "layer2:nope", data=chats(), tokens=256, seq_len=64, controls=(), metrics=("kl",),
        answers_only=True, output=str(tmp_path / "run"),
    )  # fmt: skip
    assert cli.main(["diagnose", str(tmp_path / "run")]) == 2
    assert (
        "counts answers only, and `mismatch diagnose` counts all tokens" in capsys.readouterr().err
    )
