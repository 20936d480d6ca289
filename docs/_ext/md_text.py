"""Plain text of docstrings, and tables, as Markdown. Used by `generate.py`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

ARXIV = re.compile(r"\b(\d{4}\.\d{5})(v\d)?\b")
LABEL = re.compile(r"[A-Z][a-z]+(?: [a-z]+)?: ")
"""What opens a paragraph of its own in a card: `Definition: `, `Unit: `, `Source: `."""

INSIDE = re.compile(r"(?<=\. )(Range|Null|Inherited|New|Dropped): ")
"""Labels that cards put behind another sentence."""

CODE = re.compile(r"(`[^`]+`)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
SPECIAL = re.compile(r"([\\*_\[\]<>{}$#~|^])")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are Markdown, on one line each."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[re.sub(r"(?<!\\)\|", r"\\|", " ".join(c.split())) for c in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def inline(text: str, link: Callable[[str], str] = str) -> str:
    """One paragraph of plain text: signs escaped, code kept, arXiv numbers linked.

    Args:
        text: as it stands in a docstring.
        link: makes Markdown of a code span, such as "`infini`".
    """
    parts = CODE.split(" ".join(text.split()))
    return "".join(link(part) if CODE.fullmatch(part) else _words(part) for part in parts)


def _words(text: str) -> str:
    text = FLAG.sub(r"`\g<0>`", SPECIAL.sub(r"\\\1", text))
    return ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", text)


def prose(text: str, link: Callable[[str], str] = str) -> str:
    """A docstring as Markdown: indented lines become code blocks, tables stay tables, the rest paragraphs."""
    out: list[str] = []
    lines: list[str] = []
    was = "text"

    def flush() -> None:
        while lines and not lines[-1].strip():
            lines.pop()
        if lines and was == "code":
            indent = min(len(x) - len(x.lstrip()) for x in lines if x.strip())
            out.append("\n".join(["```text", *(x[indent:] for x in lines), "```"]))
        elif lines and was == "table":
            out.append("\n".join(lines))
        elif lines:
            label = LABEL.match(lines[0])
            start = "" if label is None else f"**{label[0].strip()}** "
            rest = "\n".join(lines)[0 if label is None else label.end() :]
            out.append(start + INSIDE.sub(r"**\1:** ", inline(rest, link)))
        lines.clear()

    for line in text.strip("\n").splitlines():
        if not line.strip():
            if was == "code":
                lines.append("")  # a code block goes on behind an empty line
            else:
                flush()
            continue
        kind = "code" if line.startswith("  ") else "table" if line.startswith("|") else "text"
        if kind != was or (kind == "text" and LABEL.match(line)):
            flush()
        was = kind
        lines.append(line)
    flush()
    return "\n\n".join(out)


def toctree(*names: str, hidden: bool = False) -> str:
    """The pages below this one, in order; hidden where the page lists them itself."""
    options = [":maxdepth: 1", *([":hidden:"] if hidden else [])]
    return "\n".join(["```{toctree}", *options, "", *names, "```"])
