"""Where probes say that retrieval is lost, and where they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from asking import student
from random_models import build

from mismatch.runs.table import as_table
from mismatch.stages.lost_retrieval import keeping, lost_retrieval


def clauses(swap):
    return student(build("llama"), swap).plan.clauses


@pytest.fixture(scope="module")
def infini():
    return clauses("layer1:infini(segment=16)")


def table(name="needles", teacher=-0.2, value=-1.7, lo=-1.8, hi=-1.6):
    rows = [("teacher", "logprob", teacher, teacher, teacher),
            ("swap", "logprob_minus_teacher", value, lo, hi)]  # fmt: skip
    return as_table(
        {"run_id": "r", "student": who, "site": "logits", "metric": name, "stat": stat,
         "value": x, "lo": a, "hi": b, "n": 56, "mode": "free"}
        for who, stat, x, a, b in rows
    )  # fmt: skip


@pytest.mark.parametrize("name", ["needles", "kv_lookup", "passkey"])
def test_a_planted_loss_is_told_with_the_swap_that_keeps_it(name, infini):
    found = lost_retrieval(table(name), infini, "smollm2")
    assert found.severity == "high" and found.title == f"retrieval is lost ({name})"
    assert "-1.70 [-1.80, -1.60] nats per" in found.text and "the teacher's -0.20" in found.text
    assert found.next == (
        'mismatch repair --model smollm2 --swap "layer1:kv_slots(slots=96, segment=16)"'
    )
    assert found.evidence[f"{name}_hi"] == -1.6


@pytest.mark.parametrize(
    "changes",
    [
        {"hi": 0.1},  # the interval holds 0
        {"value": -0.1, "lo": -0.15, "hi": -0.05},  # little
        {"value": 0.5, "lo": 0.4, "hi": 0.6},  # found better
        {"lo": float("nan"), "hi": float("nan")},  # too few prompts
        {"teacher": -2.2},  # the teacher guesses
        {"name": "induction"},
    ],
)
def test_silent(changes, infini):
    assert lost_retrieval(table(**changes), infini, "m") is None


def test_silent_without_a_swap(infini):
    assert lost_retrieval(table(), (), "m") is None


def test_what_has_slots_or_is_no_attention_gets_no_proposal(infini):
    for swap in ("layer1:kv_slots(slots=4)", "layer1.mlp:zero", "layer1:infini; layer2.mlp:zero"):
        found = lost_retrieval(table(), clauses(swap), "m")
        assert found is not None and found.next is None
    heads = [replace(clause, heads=(0, 1)) for clause in infini]
    assert keeping(heads) is None
    assert keeping(clauses("layer1.attn:zero")) == "layer1:kv_slots(slots=96)"
    both = clauses("layers1-2:sliding_window(window=16)")
    assert keeping(both) == "layers[1,2]:kv_slots(slots=96, segment=16)"
