"""A Sphinx extension: the reference is made from the code before its pages are read, and docstrings fit it."""

from __future__ import annotations

from typing import Any

import generate
from sphinx.application import Sphinx

_own: dict[str, list[str]] = {}


def keep(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon, which reads "The long table: one number a row." of a property as "type: text"."""
    if what in ("property", "attribute"):
        _own[name] = [*lines]


def restore(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """After napoleon: the text of a property is what its author wrote."""
    lines[:] = _own.pop(name, lines)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", lambda _: generate.write())
    app.connect("autodoc-process-docstring", keep, priority=100)
    app.connect("autodoc-process-docstring", restore, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
