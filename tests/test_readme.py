"""The README is short and tells the truth: swaps, names, links and commands are those of the code; its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mismatch import spec
from mismatch.cli import parser
from mismatch.models.families import FAMILIES
from mismatch.registry import mechanisms

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SWAPS = re.findall(r"^\| `((?:layer|norms)[^`]+)` \|", TEXT, re.M)

TOY = {
    '"smollm2"': '"glassllm"',
    "layer12:": "layer2:",
    "tokens=8192": "tokens=512, seq_len=128",
    "max_minutes=10": "max_minutes=0.2, seq_len=128, stages=('closed-form',), train_tokens=2048, tokens=512, "
    "val_tokens=256, trace_tokens=0, self_generated=0, probes=(), controls=()",
}
"""What the README runs on a real model, made small enough for a test."""


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 180


@pytest.mark.parametrize("text", SWAPS)
def test_every_swap_in_the_table_is_valid(text):
    assert spec.check(spec.parse(text)).clauses


def test_there_are_swaps_to_check():
    assert len(SWAPS) >= 6


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", TEXT))
def test_every_file_it_points_at_is_there(link):
    assert (ROOT / link).exists()


def test_every_family_and_mechanism_is_named():
    assert all(re.search(rf"\b{family.name}\b", TEXT) for family in FAMILIES)
    assert all(f"`{name}`" in TEXT for name in mechanisms().names())


def test_every_command_is_in_the_table():
    table = TEXT.partition("## Commands")[2].partition("\n## ")[0]
    missing = [name for name in parser._tree()[1] if not re.search(rf"`(mismatch )?{name}`", table)]
    assert not missing


def test_its_python_runs(toy_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    for given, small in TOY.items():
        assert given in code
        code = code.replace(given, small)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "my-checkpoint" / "config.json").is_file()
