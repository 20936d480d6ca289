"""The tables of docs/results are those of the data in figures/."""

from __future__ import annotations

import pytest
from docs_pages import DOCS
from scripts import script

PAGES = sorted((DOCS / "results").glob("*.md"))


@pytest.fixture(scope="module")
def tables():
    return script("result_tables")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_up_to_date(tables, page):
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run `python analyses/result_tables.py`"


def test_every_table_stands_somewhere(tables):
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(f"<!-- table: {name} -->" in text for name in tables.TABLES)
