"""The README tells the truth: tables, swap texts, links and names are those of the code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from mismatch import spec
from mismatch.models.layout import FAMILIES
from mismatch.registry import mechanisms

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_generated_tables_are_up_to_date():
    found = importlib.util.spec_from_file_location(
        "readme_tables", ROOT / "analyses" / "readme_tables.py"
    )
    tables = importlib.util.module_from_spec(found)
    found.loader.exec_module(tables)
    assert tables.filled(TEXT) == TEXT, "run `python analyses/readme_tables.py`"
    assert all(f"<!-- table: {name} -->" in TEXT for name in tables.TABLES)


@pytest.mark.parametrize("text", re.findall(r"^\| `((?:layer|norms)[^`]+)` \|", TEXT, re.M))
def test_every_swap_in_the_table_is_valid(text):
    assert spec.check(spec.parse(text)).clauses


def test_there_are_swaps_to_check():
    assert len(re.findall(r"^\| `((?:layer|norms)[^`]+)` \|", TEXT, re.M)) >= 6


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", TEXT))
def test_every_file_it_points_at_is_there(link):
    assert (ROOT / link).exists()


def test_every_family_is_named():
    assert all(re.search(rf"\b{family.name}\b", TEXT) for family in FAMILIES)


def test_every_mechanism_is_in_the_table():
    assert all(f"| `{name}` |" in TEXT for name in mechanisms().names())
