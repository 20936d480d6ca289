"""A few of the malformed inputs of the analysis: every kind that costs little, and none of them surprises."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "analyses" / "malformed_inputs.py"
CHEAP = (
    *("swap text", "flags", "YAML", "Python settings", "config.json", "safetensors", "index.json"),
    *("checkpoint", "run folder", "metrics.parquet"),
)


@pytest.fixture(scope="module")
def script():
    found = importlib.util.spec_from_file_location("malformed_inputs", SCRIPT)
    module = importlib.util.module_from_spec(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "malformed_inputs", module)
        found.loader.exec_module(module)
    return module


def test_malformed_inputs_end_in_words(script, toy_folder, monkeypatch):
    monkeypatch.setattr("mismatch.stages.reporting.write_html", lambda run, output=None: run)
    table, bad = script.outcomes(toy_folder, 4 * len(CHEAP), 0, CHEAP)
    assert bad == []
    assert table["tried"].sum() == 4 * len(CHEAP) == table[["refused", "taken"]].sum().sum()
    assert table["refused"].sum() > table["taken"].sum()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_thousand(script, toy_folder):
    table, bad = script.outcomes(toy_folder, 1000, 1, ())
    assert bad == []
    assert table["tried"].sum() == 1000


def test_a_surprise_is_counted(script, tmp_path, monkeypatch):
    """A reader that fails is seen, and so is one that never ends or leaves something behind."""

    def never(case):
        while True:
            pass

    def left(case):
        (tmp_path / "x.tmp").touch()
        Path("half.tmp").touch()
        raise script.Refused("no", 2)

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
