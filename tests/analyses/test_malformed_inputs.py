"""A few of the malformed inputs of the analysis: every kind that costs little, and none of them surprises."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import script as load

CHEAP = (
    *("swap text", "flags", "YAML", "Python settings", "config.json", "safetensors", "index.json"),
    *("checkpoint", "run folder", "metrics.parquet", "rows", "layer lists", "documents of a run"),
)


@pytest.fixture(scope="module")
def script():
    return load("malformed_inputs")


def test_malformed_inputs_end_in_words(script, toy_folder, monkeypatch):
    monkeypatch.setattr("mismatch.stages.reporting.write_html", lambda run, output=None: run)
    table, bad = script.outcomes(toy_folder, 3 * len(CHEAP), 0, CHEAP)
    assert bad == []
    assert table["tried"].sum() == 3 * len(CHEAP) == table[["refused", "taken"]].sum().sum()
    assert table["refused"].sum() > table["taken"].sum()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_thousand(script, toy_folder):
    table, bad = script.outcomes(toy_folder, 1000, 1, ())
    assert bad == []
    assert table["tried"].sum() == 1000


def test_a_surprise_is_counted(script, tmp_path, monkeypatch):
    """A reader that fails is seen, and so is one that never ends or leaves something behind."""

    spoilt = load("spoilt_inputs")

    def never(case):
        while True:
            pass

    def left(case):
        (tmp_path / "x.tmp").touch()
        Path("half.tmp").touch()
        raise spoilt.Refused("no", 2)

    def broken(case):
        raise KeyError("x")

    monkeypatch.setattr(script, "SECONDS", 0.2)
    for name, kind, outcome in (
        ("never", never, "hang"),
        ("left", left, "half-written"),
        ("broken", broken, "unexpected"),
    ):
        monkeypatch.setitem(script.KINDS, name, kind)
        assert script.measured(None, name, 0)[0] == outcome
