"""The pages that the tests of the documentation read: those of the repository, and those that a build makes."""

from __future__ import annotations

import sys

import pytest
from docs_pages import DOCS, ROOT, load


@pytest.fixture(scope="session")
def reference() -> dict[str, str]:
    """The generated pages: path inside docs/reference -> Markdown. Nothing is written."""
    before = [*sys.path]
    try:
        return load(DOCS / "generate.py").pages()
    finally:
        sys.path[:] = before


@pytest.fixture(scope="session")
def written() -> dict[str, str]:
    """The pages that stand in the repository: path -> Markdown, README.md included."""
    pages = [
        ROOT / "README.md",
        ROOT / "analyses" / "README.md",
        *(path for path in DOCS.rglob("*.md") if not {"_build", "reference"} & {*path.parts}),
    ]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in pages}
