"""Wikipedia's markup to plain text: one .txt per article of a MediaWiki XML dump. No torch.

A modest stripper, not a renderer: templates, tables, references, files and formulas go; links,
emphasis and headings leave their words; sections that hold only lists of sources are cut. What it
gives depends on nothing but the dump.
"""

from __future__ import annotations

import bz2
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

SHORTEST = 400  # characters; below this a page is a stub of links, not a document

# Elements whose content is not running text.
_DROPPED = (
    "ref|math|gallery|timeline|syntaxhighlight|source|score|imagemap|hiero|chem|references|code|pre"
)
_ELEMENT = re.compile(rf"<({_DROPPED})\b[^<>]*?(?<!/)>.*?</\1\s*>", re.I | re.S)
_EMPTY = re.compile(rf"<(?:{_DROPPED})\b[^<>]*/?>", re.I)
_COMMENT = re.compile(r"<!--.*?-->", re.S)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\|)[\s\S])*?\n\s*\|\}")
_LINK = re.compile(r"\[\[((?:(?!\[\[|\]\]|\{\{).)*)\]\]", re.S)
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\]]+ ?([^\]]*)\]")
_BARE_URL = re.compile(r"(?:https?|ftp)://\S+")
_QUOTES = re.compile(r"'{2,}")
_HEADING = re.compile(r"^(={2,6})\s*(.*?)\s*=+\s*$", re.M)
_MARKER = re.compile(r"^[*#:;]+\s*", re.M)
_MAGIC = re.compile(r"__[A-Z]+__")
_INTERWIKI = re.compile(r"^[a-z-]{2,12}:\S")
_HOLLOW = re.compile(r"\(\s*(?:[;,]\s*)*\)")  # what a dropped pronunciation leaves
_LEADING = re.compile(r"\(\s*[;,]\s*")
_NAMESPACES = ("file:", "image:", "category:", "template:", "wikipedia:", "portal:", "media:")
_SOURCES_ONLY = {
    "see also", "references", "external links", "further reading", "notes", "bibliography",
    "footnotes", "sources", "citations", "notes and references", "works cited", "gallery",
}  # fmt: skip
# Templates whose argument is running text: name -> number of that argument.
_SPOKEN = {
    "nowrap": 1, "lang": 2, "transl": -1, "quote": 1, "quotation": 1, "cquote": 1, "bquote": 1,
    "sic": 1, "abbr": 1, "small": 1, "smallcaps": 1, "sc": 1, "visible anchor": 1, "nobr": 1,
    "nihongo": 1, "unicode": 1, "as of": 1, "circa": 1,
}  # fmt: skip
_MEASURES = {"convert", "cvt"}


def wiki(files: list[Path], out: Path) -> None:
    """Every article of the one dump in `files`, as `<page id>-<title>.txt` in `out`."""
    [dump] = files
    with bz2.open(dump, "rb") as file:
        for page, title, markup in articles(file):
            text = strip(markup)
            if len(text) >= SHORTEST:
                slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60]
                body = f"{title}\n\n{text}\n"
                (out / f"{page:06d}-{slug}.txt").write_text(body, encoding="utf-8", newline="\n")


def articles(file: IO[bytes]) -> Iterator[tuple[int, str, str]]:
    """(page id, title, markup) of each page of the article namespace that is no redirect."""
    for _, element in ElementTree.iterparse(file, events=("end",)):
        if element.tag.rpartition("}")[2] != "page":
            continue
        space = element.tag.removesuffix("page")
        markup = element.findtext(f"{space}revision/{space}text") or ""
        redirect = element.find(f"{space}redirect") is not None
        redirect = redirect or markup.lstrip()[:9].lower() == "#redirect"
        if element.findtext(f"{space}ns") == "0" and not redirect:
            yield int(element.findtext(f"{space}id")), element.findtext(f"{space}title"), markup
        element.clear()


def strip(markup: str) -> str:
    """Running text of an article: paragraphs and headings, one per line, blank lines between."""
    text = _COMMENT.sub("", markup)
    text = _EMPTY.sub("", _ELEMENT.sub("", _self_closed(text)))
    text = _until_stable(text, (_LINK, _link), (_TEMPLATE, _template))
    text = _until_stable(text, (_TABLE, ""), (_LINK, _link))
    text = _BARE_URL.sub("", _EXTERNAL.sub(r"\1", text))
    text = _TAG.sub("", html.unescape(_TAG.sub("", text)))
    text = _QUOTES.sub("", _MAGIC.sub("", text)).replace("\xa0", " ")
    text = _without_source_sections(text)
    text = _MARKER.sub("", _HEADING.sub(r"\2", text))
    text = _LEADING.sub("(", _HOLLOW.sub("", text))
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.split("\n"))
    # A line that still has table or template syntax in it comes from broken markup.
    kept = [line for line in lines if line and not re.match(r"[|!{}]|\w+\s*=\s*\S*$", line)]
    text = "\n\n".join(kept)
    return re.sub(r" +([,.;:)])", r"\1", text)


def _self_closed(text: str) -> str:
    return re.sub(r"<(ref|references)\b[^<>]*/>", "", text, flags=re.I)


def _until_stable(text: str, *steps: tuple[re.Pattern[str], Any]) -> str:
    """Innermost first, all steps in turn, until nothing is left to replace."""
    before = None
    while text != before:
        before = text
        for pattern, by in steps:
            text = pattern.sub(by, text)
    return text


def _template(match: re.Match[str]) -> str:
    name, *arguments = (part.strip() for part in match[1].split("|"))
    name = name.lower()
    spoken = [a.partition("=")[2] if re.match(r"1\s*=", a) else a for a in arguments]
    spoken = [a for a in spoken if not re.match(r"\w+\s*=", a)]
    if name in _MEASURES and len(spoken) >= 2:
        return f"{spoken[0]} {spoken[1]}"
    if name in _SPOKEN and len(spoken) >= abs(_SPOKEN[name]):
        number = _SPOKEN[name]
        return spoken[number] if number < 0 else spoken[number - 1]
    return ""


def _link(match: re.Match[str]) -> str:
    target, *labels = match[1].split("|")
    target = target.strip()
    if target.lower().startswith(_NAMESPACES) or (_INTERWIKI.match(target) and not labels):
        return ""
    return labels[-1] if labels else target.lstrip(":")


def _without_source_sections(text: str) -> str:
    """Cut each section whose heading is in `_SOURCES_ONLY`, up to the next of its level."""
    kept, level = [], 0
    for line in text.split("\n"):
        if heading := _HEADING.match(line):
            depth = len(heading[1])
            if not level or depth <= level:
                level = depth if heading[2].lower() in _SOURCES_ONLY else 0
        if not level:
            kept.append(line)
    return "\n".join(kept)
