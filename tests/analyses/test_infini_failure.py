"""The verdict of `analyses/infini_failure.py` follows planted numbers."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from scripts import script


def failure(module: ModuleType, slow_moved: float, memory: float, lost: tuple) -> tuple:
    moved = pd.DataFrame(
        [
            (rate, *((0.04, slow_moved) if rate == 3e-4 else (4.0, 2.0)), 0.01)
            for rate in module.GATE_RATES
        ],
        columns=["gate_lr", "travel", "moved", "kl"],
    )
    moved = moved.assign(lo=0.9 * moved["kl"], hi=1.1 * moved["kl"])
    read = pd.DataFrame(
        [
            (name, f"query_variation[branch={branch}]", layer, 0.9 if branch == "local" else memory)
            for name in module.MAPS
            for branch in ("local", "memory")
            for layer in range(3)
        ],
        columns=["feature_map", "stat", "layer", "value"],
    )
    rows = [
        (name, "lost", segments, value)
        for name in module.STUDENTS
        for segments, value in zip((0, 1, 3, 7), lost, strict=True)
    ]
    rows += [(name, "kl", np.nan, 0.1) for name in module.STUDENTS]
    found = pd.DataFrame(rows, columns=["student", "stat", "segments", "value"])
    return moved, read, found.assign(lo=found["value"] - 0.1, hi=found["value"] + 0.1)


def test_infini_failure_follows_what_was_planted():
    module = script("infini_failure")
    said = module.verdict(*failure(module, 0.03, 0.02, (0.0, 2.0, 4.0, 6.0)))
    assert "usual rate: holds" in said[0]
    assert "does not measurably change" in said[0]
    assert "ignores the query: holds" in said[1]
    assert "falls with each compression" in said[2]
    said = module.verdict(*failure(module, 3.0, 0.95, (0.0, 2.0, 2.0, 2.0)))
    assert "usual rate: does not hold" in said[0]
    assert "ignores the query: depends on the layer" in said[1]
    assert "falls at the first border" in said[2]
    for lost, word in (
        ((-0.1, -0.1, -0.1, -0.05), "keeps"),
        ((3.0, 3.0, 3.1, 3.0), "is lost without any border too"),
        ((0.0, 0.1, 0.1, 0.1), "falls at no border for sure"),
    ):
        assert word in module.verdict(*failure(module, 3.0, 0.95, lost))[2]


def test_travel_is_about_half_of_rate_times_steps():
    module = script("infini_failure")
    assert module.travel(3e-2, 400) == pytest.approx(0.5 * 3e-2 * 400, rel=0.06)
