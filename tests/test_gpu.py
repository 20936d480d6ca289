"""The toy on a CUDA device: every stage reads there what it reads on the CPU, in float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from wonderland import documents

import mismatch

pytestmark = pytest.mark.gpu
DTYPES = {"float32": 0.01, "bfloat16": 0.1}
"""How far a KL may be from that of float32 on the CPU, relative; bfloat16 keeps 8 bits."""
SWAP = "layer2:infini(segment=16)"
TEXT = documents(12)


@pytest.fixture(scope="module")
def load(toy_folder: Path) -> Any:
    """`load(device, dtype)`: the toy."""
    return lambda device, dtype: mismatch.load(str(toy_folder), device=device, dtype=dtype)


def value(table: pd.DataFrame, metric: str, stat: str, student: str = "swap") -> float:
    rows = table[(table["student"] == student) & (table["metric"] == metric)]
    rows = rows[(rows["stat"] == stat) & (rows["site"] == "logits") & (rows["position"] == "all")]
    return float(rows["value"].iloc[0])


FEW = {"data": TEXT, "tokens": 256, "seq_len": 64}
TRAINED = {"train_data": documents(8, seed=1), "val_tokens": 128, "train_tokens": 512}


def scanned(teacher: Any) -> pd.DataFrame:
    run = mismatch.scan(teacher, SWAP.partition(":")[2], tasks=("text",), **FEW)
    return run.table[run.table["layer"] == 2].assign(student="swap")


def repaired(teacher: Any) -> pd.DataFrame:
    """What closed form and two epochs of the stage `local` leave."""
    table = mismatch.repair(
        teacher, SWAP, stages=("closed-form", "local"), epochs=2, max_minutes=None, self_generated=0.0,
        retrieval_text=0.0, controls=(), probes=(), trace_tokens=0, min_gain=0.0, **FEW, **TRAINED,
    ).table  # fmt: skip
    return table[table["stage"] == "repair"]


def trained(teacher: Any) -> pd.DataFrame:
    table = mismatch.train(
        teacher, SWAP, trainer=["max_steps=2"], controls=(), batch_size=2, eval_every=1, **FEW, **TRAINED,
    ).table  # fmt: skip
    return table[table["step"] == 2]


STAGES: dict[str, tuple[Callable[[Any], pd.DataFrame], str, str]] = {
    "trace": (lambda teacher: mismatch.trace(teacher, swap=SWAP, controls=("zero",), **FEW).table, "kl", "mean"),
    "probe": (
        lambda teacher: mismatch.probe(
            teacher, swap=SWAP, data=TEXT, probes=("induction",), samples=3, seq_len=64
        ).table,
        *("induction", "nll_second"),
    ),
    "scan": (scanned, "kl", "mean"),
    "diagnose": (
        lambda teacher: mismatch.diagnose(
            teacher, SWAP, data=TEXT, tokens=512, seq_len=64, controls=(), fit_tokens=512, heads=0
        ).table,
        *("kl", "mean"),
    ),
    "plan": (
        lambda teacher: mismatch.plan(
            teacher, SWAP.partition(":")[2], layers=1, among="2", selection_tokens=256, controls=(), **FEW
        ).table,
        *("kl", "mean"),
    ),
    "repair": (repaired, "kl", "mean"),
    "train": (trained, "kl", "mean"),
}  # fmt: skip


def measured(teacher: Any, stage: str) -> float:
    """The headline of a short run, in nats."""
    run, metric, stat = STAGES[stage]
    return value(run(teacher), metric, stat)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reads_on_the_gpu_what_it_reads_on_the_cpu(load, stage, dtype):
    teacher = load("cuda", dtype)
    assert {str(p.device.type) for p in teacher.model.parameters()} == {"cuda"}
    expected = measured(load("cpu", "float32"), stage)
    assert measured(teacher, stage) == pytest.approx(expected, rel=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_not_changed_is_exactly_zero(load, dtype):
    run = mismatch.trace(
        load("cuda", dtype), swap="layer2:identity", data=TEXT, tokens=256, seq_len=64, controls=()
    )
    assert value(run.table, "kl", "mean") == 0
