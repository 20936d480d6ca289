"""Pieces of HTML. Every text that goes in is escaped here, so that no name or token can act."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def safe(value: Any) -> Html:
    """Anything as HTML: escaped, unless it is HTML already."""
    return value if isinstance(value, Html) else Html(escape(str(value), quote=True))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element. Children are escaped unless they are Html; `class_` is `class`."""
    given = "".join(f' {k.rstrip("_")}="{safe(v)}"' for k, v in attributes.items() if v is not None)
    inner = "".join(safe(child) for child in children)
    return Html(f"<{name}{given}>{inner}</{name}>")


def join(parts: Iterable[Any], by: str = "\n") -> Html:
    return Html(by.join(safe(part) for part in parts))


def grid(
    heads: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    *,
    numbers: Sequence[int] = (),
    marked: Sequence[int] = (),
) -> Html:
    """A table; columns in `numbers` are set to the right, rows in `marked` stand out."""

    def cells(kind: str, row: Sequence[Any]) -> Html:
        return join(
            (tag(kind, c, class_="n" if i in numbers else None) for i, c in enumerate(row)), ""
        )

    body = [
        tag("tr", cells("td", row), class_="swap" if i in marked else None)
        for i, row in enumerate(rows)
    ]
    head = tag("thead", tag("tr", cells("th", heads))) if heads else Html("")
    return tag("div", tag("table", head, tag("tbody", *body)), class_="scroll")


def pairs(data: Mapping[str, Any]) -> Html:
    """A two-column table of names and values; what is nested becomes `name value, name value`."""
    return grid((), [(key, _flat(value)) for key, value in data.items()])


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_flat(inner) for inner in value)
    return str(value)


def picture(svg: bytes, alt: str, caption: str) -> Html:
    """A figure inside the page: vector, as data, on white paper in dark mode too."""
    data = base64.b64encode(svg).decode()
    image = Html(f'<img alt="{safe(alt)}" src="data:image/svg+xml;base64,{data}">')
    return tag("figure", tag("div", image, class_="scroll"), tag("figcaption", caption))


def document(title: str, *parts: Any) -> str:
    """The whole page: one file that loads nothing."""
    css = files("mismatch.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{safe(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        f"{join(parts)}\n</body>\n</html>\n"
    )
