"""Mechanisms without a target, and layers without a mechanism: the two lists that scan and plan take.

    templates = template (";" template)*        infini(segment=64); nope; mlp:zero
    template  = [slot ":"] mechanism            the slot defaults to the mechanism's own
    layers    = "all" | ranges                  0-9    0,4,8    0-last/2

A template at a layer is a swap like any other: `infini` at layer 12 is `layer12:infini`. Columns in errors count in
the text that was given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mismatch.errors import SpecError
from mismatch.spec.clauses import SLOTS, TARGETS, Call, Clause, Range, Spec, Target
from mismatch.spec.grammar import _Parser, joined
from mismatch.spec.placement import _layers, check

_SLOT = re.compile(r"([A-Za-z_]\w*)\s*:")
_TARGET = re.compile(rf"({'|'.join(TARGETS)})(?![A-Za-z_])[^:;(]*:")
_EXAMPLE = "write mechanisms, such as `infini(segment=64); zero`"


@dataclass(frozen=True)
class Template:
    """A mechanism without a layer. `text` is the whole text that it was read from."""

    call: Call
    slot: str | None = None
    text: str = ""
    slot_at: int = 0

    def __str__(self) -> str:
        return str(self.call) if self.slot is None else f"{self.slot}:{self.call}"

    def at(self, layer: int, kind: str = "", head: int | None = None) -> Spec:
        """The swap of one layer, or of one of its heads; `kind` is "heads" or "kv_heads"."""
        heads = () if head is None else (Range(head, head),)
        return self.over((Range(layer, layer),), kind, heads)

    def over(
        self, ranges: tuple[Range, ...], kind: str = "", heads: tuple[Range, ...] = ()
    ) -> Spec:
        """The swap of several layers, or of some of their heads."""
        at = self.call.at
        target = Target("layers", ranges, self.slot, at, self.slot_at, kind, heads, at)
        return Spec((Clause(target, self.call),), self.text)


def templates(text: str | Iterable[str]) -> tuple[Template, ...]:
    """Read mechanisms without a target, and check their names, slots and arguments.

    Raises:
        SpecError: not in the grammar, a target in front, an unknown mechanism, slot or argument, or one named twice.
    """
    whole = joined(text)
    if not whole:
        raise SpecError("there is no mechanism", hint=_EXAMPLE)
    parser = _Parser(whole)
    found: list[Template] = []
    while not found or parser.take(";"):
        if parser.peek() in ("", ";"):
            parser.fail("a mechanism is missing", parser.pos, _EXAMPLE)
        template = _template(parser)
        if any(str(template) == str(other) for other in found):
            parser.fail(f"`{template}` is named twice", template.call.at)
        found.append(template)
    if parser.peek():
        parser.fail(f"expected `;` or the end, got {parser.rest()}", parser.pos)
    return tuple(found)


def _template(parser: _Parser) -> Template:
    parser.space()
    at, slot = parser.pos, None
    prefix = _SLOT.match(parser.text, at)
    if prefix is not None and prefix.group(1) in SLOTS:
        slot, parser.pos = prefix.group(1), prefix.end()
    elif (target := _TARGET.match(parser.text, at)) is not None:
        word = target.group()[:-1].strip()
        hint = (
            "it belongs to no layer: `mismatch trace` swaps it"
            if word.startswith("final_norm")
            else "leave it out; --among names the layers"
        )
        parser.fail(f"`{word}` is a target: here mechanisms stand without one", at, hint)
    template = Template(parser.call(), slot, parser.text, at)
    return Template(check(template.at(0)).clauses[0].call, slot, parser.text, at)


def layers(text: str, n_layers: int) -> tuple[int, ...]:
    """The layers that are meant, ascending.

    Args:
        text: "all", or ranges such as "0-9", "0,4,8", "0-last/2".
        n_layers: of the model.

    Raises:
        SpecError: not in the grammar, a layer that is not there, or one named twice.
    """
    ranges = parse_layers(text)
    target = Target("all" if ranges is None else "layers", ranges or ())
    return tuple(sorted(_layers(target, n_layers, text)))


def parse_layers(text: str) -> tuple[Range, ...] | None:
    """The ranges that are written; None for all.

    Raises:
        SpecError: not in the grammar.
    """
    if text.strip() == "all":
        return None
    parser = _Parser(text)
    if re.fullmatch(r"[A-Za-z_]+", text.strip()) and text.strip() != "last":
        parser.fail(f"unknown layers `{text.strip()}`", 0, "write `all`, or ranges such as `0-9`")
    found = parser.ranges()
    if parser.peek():
        parser.fail(f"expected `,` or the end, got {parser.rest()}", parser.pos)
    return found
