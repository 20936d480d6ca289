"""The toy on a CUDA device: trace, probe and scan read there what they read on the CPU, in float32 and bfloat16."""

from __future__ import annotations

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
TEXT = documents(4)


@pytest.fixture(scope="module")
def load(toy_folder: Path) -> Any:
    """`load(device, dtype)`: the toy."""
    return lambda device, dtype: mismatch.load(str(toy_folder), device=device, dtype=dtype)


def value(table: pd.DataFrame, metric: str, stat: str, student: str = "swap") -> float:
    rows = table[(table["student"] == student) & (table["metric"] == metric)]
    rows = rows[(rows["stat"] == stat) & (rows["site"] == "logits") & (rows["position"] == "all")]
    return float(rows["value"].iloc[0])


def measured(teacher: Any, stage: str) -> float:
    """The headline of a short run, in nats."""
    if stage == "trace":
        run = mismatch.trace(
            teacher, swap=SWAP, data=TEXT, tokens=256, seq_len=64, controls=("zero",)
        )
        return value(run.table, "kl", "mean")
    if stage == "probe":
        run = mismatch.probe(
            teacher, swap=SWAP, data=TEXT, probes=("induction",), samples=3, seq_len=64
        )
        return value(run.table, "induction", "nll_second")
    run = mismatch.scan(
        teacher, SWAP.partition(":")[2], data=TEXT, tasks=("text",), tokens=256, seq_len=64
    )
    table = run.table[run.table["layer"] == 2]
    return value(table, "kl", "mean", SWAP.partition(":")[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", ["trace", "probe", "scan"])
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
