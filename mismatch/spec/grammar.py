"""From the text of a swap to its clauses, each with the column where it stands (see `mismatch.spec`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NoReturn

from mismatch.errors import SpecError
from mismatch.registry import did_you_mean
from mismatch.spec.clauses import (
    HEADS,
    LITERALS,
    SLOTS,
    TARGETS,
    WORD,
    Call,
    Clause,
    Range,
    Spec,
    Target,
    Value,
)

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?(?![\w.])")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_MECHANISM = re.compile(r"[A-Za-z_][\w.]*(:[A-Za-z_]\w*)?")
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"' + r"|'((?:[^'\\]|\\['\\])*)'")
_EXAMPLE = "write `target:mechanism`, such as `layer12:infini`"
LONGEST = 50_000
"""Characters of a swap: a clause of its own for each of 1,000 layers."""
_DEEPEST = 16
"""Mechanisms inside one another."""
_DIGITS = 18
"""Of a number in front of its point: a whole number fits into 64 bits."""


def parse(text: str | Iterable[str]) -> Spec:
    """Read a swap, or several that are joined.

    Raises:
        SpecError: the text is not in the grammar, or is longer than `LONGEST`; shows it with a caret.
    """
    whole = joined(text)
    if not whole:
        raise SpecError("the swap is empty", hint=_EXAMPLE)
    return _Parser(whole).spec()


def joined(text: str | Iterable[str]) -> str:
    """Several texts as one, on one line.

    Raises:
        SpecError: longer than `LONGEST`, or not text.
    """
    parts = [text] if isinstance(text, str) else list(text)
    if any(not isinstance(part, str) for part in parts):
        raise SpecError("a swap must be text", hint=_EXAMPLE)
    whole = "; ".join(re.sub(r"\s", " ", part).strip("; ") for part in parts)
    if len(whole) > LONGEST:
        raise SpecError(f"the swap has {len(whole):,} characters, more than {LONGEST:,}")
    return whole


class _Parser:
    """Recursive descent over one text. `pos` is the column that is read next."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.pos = 0
        self.deep = 0

    def fail(self, message: str, at: int, hint: str | None = None) -> NoReturn:
        raise SpecError(message, text=self.text, at=at, hint=hint)

    def space(self) -> None:
        while self.text[self.pos : self.pos + 1] == " ":
            self.pos += 1

    def peek(self) -> str:
        self.space()
        return self.text[self.pos : self.pos + 1]

    def take(self, symbol: str) -> bool:
        if self.peek() != symbol:
            return False
        self.pos += 1
        return True

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        self.space()
        found = pattern.match(self.text, self.pos)
        if found is not None:
            self.pos = found.end()
        return found

    def rest(self) -> str:
        """What stands here, for an error: up to the next sign or space."""
        found = re.match(r"[^\s;:,=()\[\]]+|.", self.text[self.pos :])
        return f"`{found.group()}`" if found else "the end"

    def spec(self) -> Spec:
        clauses: list[Clause] = []
        while not clauses or self.take(";"):
            if self.peek() in ("", ";"):
                self.fail("a clause is empty", self.pos, _EXAMPLE)
            clauses.append(self.clause())
        if self.peek():
            self.fail(f"expected `;` or the end, got {self.rest()}", self.pos)
        return Spec(tuple(clauses), self.text)

    def clause(self) -> Clause:
        target = self.target()
        if not self.take(":"):
            self.fail(
                f"expected `:` and a mechanism after `{target}`, got {self.rest()}",
                self.pos,
                _EXAMPLE,
            )
        return Clause(target, self.call())

    def target(self) -> Target:
        self.space()
        at = self.pos
        found = self.match(re.compile(r"[A-Za-z_]+"))
        kind = found.group() if found else ""
        last = re.fullmatch(r"(layers?)(last)", kind)
        if last:  # `layerlast`: the word runs into the layer
            kind, self.pos = last.group(1), at + len(last.group(1))
        if kind not in TARGETS:
            self.pos = at
            hint = did_you_mean(kind, TARGETS) if kind else "write a target, such as `layer12`"
            self.fail(f"unknown target {self.rest()}", at, hint)
        ranges: tuple[Range, ...] = ()
        if kind in ("layer", "layers"):
            kind, ranges = "layers", self.ranges()
        slot, slot_at = None, self.pos
        heads: tuple[str, tuple[Range, ...], int] = ("", (), self.pos)
        if self.take("."):
            if kind not in ("norms", "final_norm") and (found_heads := self.heads()):
                return Target(kind, ranges, None, at, slot_at, *found_heads)
            self.space()
            slot_at = self.pos
            slot = found.group() if (found := self.match(_IDENTIFIER)) else ""
            if kind in ("norms", "final_norm"):
                self.fail(f"`{kind}` takes no slot", slot_at, f"write `{kind}:mechanism`")
            if slot == "final_norm":
                self.fail(
                    "`final_norm` belongs to no layer", slot_at, "write `final_norm:mechanism`"
                )
            if slot not in SLOTS:
                self.fail(f"unknown slot `{slot}`", slot_at, did_you_mean(slot, (*SLOTS, *HEADS)))
            if self.take("."):
                heads = self.heads() or self.fail(
                    f"expected `heads` or `kv_heads` behind the slot, got {self.rest()}",
                    self.pos,
                    f"write `{Target(kind, ranges, slot)}.heads[0-3]:mechanism`",
                )
        return Target(kind, ranges, slot, at, slot_at, *heads)

    def heads(self) -> tuple[str, tuple[Range, ...], int] | None:
        """Heads of a layer, their kind and where it stands; None where no such word stands here."""
        self.space()
        at = self.pos
        found = self.match(re.compile(rf"({'|'.join(HEADS)})(?![A-Za-z_])"))
        if found is None:
            return None
        opened = self.pos
        if self.take("[") and self.peek() == "]":
            self.fail(f"`{found.group()}[]` names no head", at, f"write `{found.group()}[0-3]`")
        self.pos = opened
        return found.group(), self.ranges("head"), at

    def ranges(self, of: str = "layer") -> tuple[Range, ...]:
        self.space()
        opened = self.pos
        closing = self.take("[")
        found = [self.range(of)]
        while self.take(","):
            found.append(self.range(of))
        if closing and not self.take("]"):
            if self.peek() in ("", ":", ";"):
                self.fail("`[` is never closed", opened, "close it with `]`")
            self.fail(f"expected `,` or `]`, got {self.rest()}", self.pos)
        return tuple(found)

    def range(self, of: str) -> Range:
        self.space()
        at = self.pos
        first = last = self.number(of)
        step = 1
        if self.take("-"):
            last = self.number(of)
            if self.take("/"):
                found = self.match(re.compile(r"\d+"))
                step = self.whole(found.group()) if found else 0
                if step < 1:
                    self.fail(f"the step of `{self.text[at : self.pos]}` must be at least 1", at)
        ends = Range(first, last)
        if last is not None and (first is None or first > last):
            self.fail(f"empty range `{ends}`", at, f"did you mean `{Range(last, first)}`?")
        if first is not None and last is not None:
            last = first + (last - first) // step * step
        return Range(first, last, 1 if first == last else step, at)

    def number(self, of: str) -> int | None:
        found = self.match(re.compile(r"\d+|last(?![A-Za-z_])"))
        if found is None:
            hint = f"{of}s count from 0" + (
                "; the last one is `last`, `-` makes a range"
                if self.peek() == "-"
                else f", as in `{'layer12' if of == 'layer' else 'heads[0-3]'}`"
            )
            self.fail(f"expected a {of} number or `last`, got {self.rest()}", self.pos, hint)
        return None if found.group() == "last" else self.whole(found.group())

    def whole(self, digits: str) -> int:
        """A whole number that was just read."""
        if len(digits.lstrip("+-")) > _DIGITS:
            self.fail(f"a number of {len(digits)} digits is too large", self.pos - len(digits))
        return int(digits)

    def call(self) -> Call:
        if self.deep >= _DEEPEST:
            self.fail(f"more than {_DEEPEST} mechanisms inside one another", self.pos)
        self.deep += 1
        try:
            return self.one_call()
        finally:
            self.deep -= 1

    def one_call(self) -> Call:
        self.space()
        at = self.pos
        found = self.match(_MECHANISM)
        if found is None:
            self.fail(
                f"expected the name of a mechanism, got {self.rest()}",
                at,
                "`mismatch list mechanisms` shows them",
            )
        opened = self.pos
        args: list[tuple[str, Value]] = []
        columns: list[tuple[int, int]] = []
        if self.take("(") and not self.take(")"):
            while True:
                self.argument(found.group(), args, columns)
                if self.take(")"):
                    break
                if not self.take(","):
                    if self.peek() in ("", ";"):
                        self.fail("`(` is never closed", opened, "close it with `)`")
                    self.fail(f"expected `,` or `)`, got {self.rest()}", self.pos)
        return Call(found.group(), tuple(args), at, tuple(columns))

    def argument(
        self, of: str, args: list[tuple[str, Value]], columns: list[tuple[int, int]]
    ) -> None:
        self.space()
        at = self.pos
        found = self.match(_IDENTIFIER)
        if found is not None and self.take("="):
            key = found.group()
            self.space()
            value_at = self.pos
            value = self.value(key)
            if any(key == other for other, _ in args):
                self.fail(f"`{of}` got `{key}` twice", at)
        else:
            self.pos = at
            if self.peek() in ("", ";"):
                self.fail("`(` is never closed", self.text.rfind("(", 0, at), "close it with `)`")
            if found is None and (
                not _NUMBER.match(self.text, at) or any(name for name, _ in args)
            ):
                self.fail(
                    f"expected `name=value`, got {self.rest()}",
                    at,
                    f"`mismatch explain {of}` shows the names",
                )
            key, value_at = "", at
            value = self.value(of) if found is None else self.call()
            if isinstance(value, Call) and args:
                self.fail(f"expected `name=value`, got `{value}`", at, "a mechanism comes first")
        args.append((key, value))
        columns.append((at, value_at))

    def value(self, key: str) -> Value:
        self.space()
        at = self.pos
        if self.peek() in ("'", '"'):
            quoted = self.match(_QUOTED)
            if quoted is None:
                self.fail("the quotes are never closed", at)
            body = quoted.group(1) if quoted.group(1) is not None else quoted.group(2)
            return re.sub(r"\\(.)", r"\1", body)
        if self.take("["):
            return self.items(key, at)
        number = self.numeral()
        if number is not None:
            return number
        called = re.compile(r"[A-Za-z_][\w.]*(:[A-Za-z_]\w*|(?=\s*\())").match(self.text, at)
        if called is not None:
            return self.call()
        word = self.match(WORD)
        if word is None:
            self.fail(
                f"`{key}` needs a value, got {self.rest()}", at, f'quote other text: `{key}="a b"`'
            )
        return LITERALS.get(word.group(), word.group())

    def numeral(self) -> int | float | None:
        found = self.match(_NUMBER)
        if found is None:
            return None
        digits = found.group()
        return self.whole(digits) if re.fullmatch(r"[+-]?\d+", digits) else float(digits)

    def word(self) -> str | None:
        found = self.match(WORD)
        return None if found is None else found.group()

    def items(self, key: str, opened: int) -> tuple[Any, ...]:
        """Words, or numbers."""
        found: list[Any] = []
        numbers = bool(self.peek()) and _NUMBER.match(self.text, self.pos) is not None
        while not found or self.take(","):
            item = self.numeral() if numbers else self.word()
            if item is None:
                kind = "numbers" if numbers else "words" if found else "words or numbers"
                self.fail(f"`{key}` needs {kind} in `[ ]`, got {self.rest()}", self.pos)
            found.append(item)
        if not self.take("]"):
            if self.peek() in ("", ";", ")"):
                self.fail("`[` is never closed", opened, "close it with `]`")
            self.fail(f"expected `,` or `]`, got {self.rest()}", self.pos)
        return tuple(found)
