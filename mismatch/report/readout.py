"""What a mark of a figure reads out: a cell, a point or a bar tells its numbers on hover, tap and keyboard focus.

A drawing function names an artist and gives a text for each mark in it (`read_out`). matplotlib writes the name into
the SVG as an id, and `inline` puts the texts there as titles; page.js shows them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from weakref import WeakKeyDictionary
from xml.etree import ElementTree

from matplotlib.artist import Artist
from matplotlib.figure import Figure

from mismatch.report.page import Html
from mismatch.report.quantity import CONTROLS

_TEXTS: WeakKeyDictionary[Artist, tuple[str, ...]] = WeakKeyDictionary()

_DRAWN = ("path", "use")
_INHERITED = ("fill", "stroke", "stroke-width", "stroke-linejoin", "stroke-linecap")
_URL = re.compile(r"url\(#([^)]+)\)")
_NUMBER = re.compile(r"-?\d+\.\d+")
_BOX = re.compile(r"^M(\S+) (\S+)L(\S+) \2L\3 (\S+)L\1 \4(?:L\1 \2)?z?$")
_NO_XML = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def lines(where: str, numbers: Mapping[str, str]) -> str:
    """The text of one mark: where it is, then a line for each of its numbers that is known."""
    return "\n".join([where, *(f"{name}: {text}" for name, text in numbers.items() if text)])


def called(student: str) -> str:
    """How a student is named beside another one: a control as what it is."""
    return f"control {student}" if student in CONTROLS else student


def read_out(artist: Artist, name: str, texts: Sequence[str]) -> None:
    """Give a text to each mark of an artist.

    Args:
        artist: a line with markers, a mesh, a patch.
        name: its id in the SVG, once in a figure.
        texts: in the order in which the marks are drawn; an empty one gives its mark no text.
    """
    artist.set_gid(name)
    _TEXTS[artist] = tuple(texts)


def texts_of(figure: Figure) -> dict[str, tuple[str, ...]]:
    """The texts of a figure, by the names of their artists.

    Raises:
        ValueError: two artists have one name.
    """
    found: dict[str, tuple[str, ...]] = {}
    for artist in figure.findobj(lambda a: a in _TEXTS):
        name = str(artist.get_gid())
        if name in found:
            raise ValueError(f"two artists of a figure are called `{name}`")
        found[name] = _TEXTS[artist]
    return found


def inline(svg: bytes, prefix: str, label: str, texts: Mapping[str, Sequence[str]]) -> Html:
    """An SVG of matplotlib as an element of a page.

    Args:
        svg: the file.
        prefix: goes before its ids: a page holds several figures.
        label: what it shows, for those who cannot see it.
        texts: what `texts_of` gave of the figure.
    """
    root = ElementTree.fromstring(_NO_XML.sub(b"", svg))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {k.rpartition("}")[2]: v for k, v in element.attrib.items()}
        element.text = element.text if element.tag == "text" else None
        element.tail = None
    for child in [c for c in root if c.tag == "metadata" or (c.tag == "defs" and _is_style(c))]:
        root.remove(child)
    _rename(root, prefix, keep=texts)
    for element in list(root.iter()):
        _shorten(element)
    for element in list(root.iter()):
        name = element.get("id", "").removeprefix(f"{prefix}-")
        if name in texts:
            _title(element, texts[name])
    root.attrib = {
        "class": "figure",
        "role": "group",
        "aria-label": label,
        "viewBox": root.get("viewBox", ""),
    }
    return Html(ElementTree.tostring(root, encoding="unicode"))


def _is_style(defs: ElementTree.Element) -> bool:
    return len(defs) > 0 and defs[0].tag == "style"


def _title(group: ElementTree.Element, texts: Sequence[str]) -> None:
    """Give the marks of a group their titles; where they cannot be told apart, none."""
    found = list(_marks(group))
    found = [(parent, mark) for parent, mark in found if mark.tag == "use"] or found
    if len(found) != len(texts):
        return
    for (_, mark), text in zip(found, texts, strict=True):
        if text:
            ElementTree.SubElement(mark, "title").text = text
    parents = {id(parent): parent for parent, _ in found}
    if len(found) > 1 and len(parents) == 1:
        _hoist(next(iter(parents.values())), [mark for _, mark in found])


def _marks(
    group: ElementTree.Element,
) -> Iterator[tuple[ElementTree.Element, ElementTree.Element]]:
    """What is drawn in a group, each with what it stands in."""
    for element in group:
        if element.tag in _DRAWN:
            yield group, element
        elif element.tag != "defs":
            yield from _marks(element)


def _hoist(parent: ElementTree.Element, marks: Sequence[ElementTree.Element]) -> None:
    """What all marks have in common stands once, where they stand in."""
    styles = [_style(mark) for mark in marks]
    common = {
        key: value
        for key, value in styles[0].items()
        if key in _INHERITED and all(style.get(key) == value for style in styles)
    }
    parent.set("style", _style_text(common))
    for mark, style in zip(marks, styles, strict=True):
        mark.set("style", _style_text({k: v for k, v in style.items() if k not in common}))
        if not mark.get("style"):
            del mark.attrib["style"]
    clips = {mark.attrib.get("clip-path", "") for mark in marks}
    if len(clips) == 1 and (clip := clips.pop()):
        parent.set("clip-path", clip)
        for mark in marks:
            del mark.attrib["clip-path"]


def _style(element: ElementTree.Element) -> dict[str, str]:
    parts = (part.partition(":") for part in element.get("style", "").split(";") if part)
    return {key: value for key, _, value in parts}


def _style_text(style: Mapping[str, str]) -> str:
    return ";".join(f"{key}:{value}" for key, value in style.items())


def _rename(root: ElementTree.Element, prefix: str, keep: Mapping[str, object]) -> None:
    """Short ids behind the prefix for what something refers to, the names of artists, and no other ids."""
    used = dict.fromkeys(keep, "")
    for element in root.iter():
        for key, value in element.attrib.items():
            inner = key == "href" and value.startswith("#")
            used |= dict.fromkeys([value[1:]] if inner else _URL.findall(value), "")
    new = {old: f"{prefix}-{old if old in keep else at}" for at, old in enumerate(used)}
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "href" and value.startswith("#"):
                element.set(key, f"#{new[value[1:]]}")
            elif key != "id":
                element.set(key, _URL.sub(lambda m: f"url(#{new[m[1]]})", value))
            elif value in new:
                element.set(key, new[value])
            else:
                del element.attrib[key]


def _shorten(element: ElementTree.Element) -> None:
    """Two decimals of a point, no spaces that nobody reads, a box in one line."""
    for key in ("d", "x", "y", "width", "height", "points"):
        if key in element.attrib:
            element.set(
                key,
                _NUMBER.sub(
                    lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), element.attrib[key]
                ),
            )
    if "d" in element.attrib:
        path = re.sub(r"\s*([MLCQz])\s*", r"\1", element.attrib["d"]).strip()
        element.set("d", _BOX.sub(r"M\1 \2H\3V\4H\1z", path))
    if "style" in element.attrib:
        element.set("style", re.sub(r"\s*([:;])\s*", r"\1", element.attrib["style"]))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    if element.tag == "text":
        element.set("style", re.sub(r"font-family:[^;]*;?", "", element.get("style", "")))
