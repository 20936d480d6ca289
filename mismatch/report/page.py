"""Pieces of HTML. Every text that goes in is escaped here, so that no name or token can act."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

from mismatch.report import style

LONG = 24
"""Rows from which a table scrolls inside a box of its own."""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


class Cell(NamedTuple):
    """A cell of a table, and the number by which its column is sorted."""

    text: Any
    by: float


def safe(value: Any) -> Html:
    """Anything as HTML: escaped, unless it is HTML already."""
    return value if isinstance(value, Html) else Html(escape(str(value), quote=True))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element. Children are escaped unless they are Html; `class_` is `class`, `data_by` is `data-by`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{safe(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(safe(child) for child in children)
    return Html(f"<{name}{given}>{inner}</{name}>")


def join(parts: Iterable[Any], by: str = "\n") -> Html:
    return Html(by.join(safe(part) for part in parts))


def reading(value: float | None, lo: float = math.nan, hi: float = math.nan) -> Cell:
    """`0.0612 [0.0551, 0.0670]`, sorted by its value."""
    number = math.nan if value is None else float(value)
    text, _, band = style.interval(number, lo, hi).partition(" ")
    return Cell(join([text, tag("span", band, class_="band")], " ") if band else text, number)


def whole(n: int) -> Cell:
    """`8,192`, sorted as a number."""
    return Cell(f"{n:,}", float(n))


def grid(
    heads: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    *,
    numbers: Sequence[int] = (),
    marked: Sequence[int] = (),
) -> Html:
    """A table that sorts by each of its columns (page.js).

    Args:
        heads: one a column, none of them empty: a heading is what a reader clicks.
        rows: of text, Html or `Cell`.
        numbers: columns that are set to the right.
        marked: rows that stand out.
    """

    def cell(kind: str, at: int, content: Any) -> Html:
        text, by = content if isinstance(content, Cell) else (content, math.nan)
        known = None if math.isnan(by) else f"{by:.9g}".replace("inf", "Infinity")
        return tag(kind, text, class_="n" if at in numbers else None, data_by=known)

    def line(kind: str, row: Sequence[Any], marks: str | None = None) -> Html:
        return tag("tr", *(cell(kind, at, c) for at, c in enumerate(row)), class_=marks)

    body = [line("td", row, "swap" if at in marked else None) for at, row in enumerate(rows)]
    table = tag("table", tag("thead", line("th", heads)), tag("tbody", *body))
    return tag("div", table, class_="scroll long" if len(body) > LONG else "scroll")


def pairs(data: Mapping[str, Any]) -> Html:
    """A two-column table of names and values; what is nested has a row of its own, what is empty none."""
    rows = [(name, value) for name, value in _flat(data) if value != ""]
    return tag("div", grid(("name", "value"), rows), class_="pairs words")


def _flat(data: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key} \u00b7 ")
        elif isinstance(value, (list, tuple)):
            yield f"{before}{key}", ", ".join(map(str, value))
        elif value is not None:
            yield f"{before}{key}", str(value)


def picture(views: Sequence[tuple[str, Html]], caption: str, choose: str = "metric") -> Html:
    """A figure with its caption; of several views one is shown, chosen above it.

    Args:
        views: label and SVG of each, the first one shown (`readout.inline`).
        caption: below it.
        choose: what is chosen.
    """
    shown = [
        tag("div", svg, class_="scroll paper", hidden=None if at == 0 else "")
        for at, (_, svg) in enumerate(views)
    ]
    options = [tag("option", label) for label, _ in views]
    picker = tag("label", choose, tag("select", *options), class_="choose", hidden="")
    parts = [*([picker] if len(views) > 1 else []), *shown, tag("figcaption", caption)]
    return tag("figure", *parts)


def document(title: str, *parts: Any) -> str:
    """The whole page: one file that loads nothing, and runs no script but its own."""
    here = files("mismatch.report")
    css = here.joinpath("page.css").read_text(encoding="utf-8")
    script = here.joinpath("page.js").read_text(encoding="utf-8")
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{known}'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{safe(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        f"{join(parts)}\n<script>{script}</script>\n</body>\n</html>\n"
    )
