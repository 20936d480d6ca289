"""The card of a mechanism, metric or probe: its description and arguments, read from its file without importing it.

A mechanism file imports torch. `list`, `explain`, `--help` and the check of a swap text need only its description and
the names and types of its arguments, so those are read from the source with `ast`. What is read:

    text      the module docstring (of a class in a notebook: its own docstring)
    facts     the class attributes that are literals (`slots`, `identity`, `unit`, `null`, ...)
    args      the fields of the dataclass that the class attribute `Config` names

Annotations understood: `int`, `float`, `bool`, `str`, `Call` (another mechanism), `tuple[str, ...]`,
`int | tuple[int, ...]`, `Literal[...]`, `X | None`, and `Annotated[X, bound]` with a bound of the form ">= n", "> n" or
"a..b" (both inclusive), which holds for each number of a list.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mismatch.reading import INT, shown
from mismatch.registry.source import CardError, home, origin, parsed, source

TYPES = ("int", "float", "bool", "str", "Call", "list", "ints")
"""`list` is `tuple[str, ...]`, `ints` is `int | tuple[int, ...]`."""


_BOUND = re.compile(r">=? -?[\d.]+|-?[\d.]+?\.\.-?[\d.]+")


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Any = _Required()
"""The default of an argument that has none."""


@dataclass(frozen=True)
class Arg:
    """One argument of a mechanism: a field of its Config."""

    name: str
    type: str
    """One of `TYPES`."""
    choices: tuple[Any, ...] | None = None
    optional: bool = False
    """`none` is a value."""
    bound: str | None = None
    default: Any = REQUIRED
    doc: str = ""

    @property
    def allowed(self) -> str:
        """The type in words: `int >= 1`, `one of linear, delta`, `float or none`."""
        named = {"Call": "a mechanism", "list": "a list of words", "ints": "int"}
        words = named.get(self.type, self.type)
        if self.choices is not None:
            words = "one of " + ", ".join(str(choice) for choice in self.choices)
        elif self.bound is not None:
            words += f" in {self.bound}" if ".." in self.bound else f" {self.bound}"
        if self.type == "ints":
            words += ", or a list of such"
        return words + (" or none" if self.optional else "")

    def within(self, value: float) -> bool:
        """Whether a number lies inside the bound."""
        if self.bound is None:
            return True
        if ".." in self.bound:
            low, high = self.bound.split("..")
            return float(low) <= value <= float(high)
        sign, limit = self.bound.split()
        return value >= float(limit) if sign == ">=" else value > float(limit)

    def accept(self, value: Any) -> Any:
        """The value in the type of the argument: an int becomes a float, a list a tuple.

        Raises:
            ValueError: another type, outside the choices or the bound, or a number that no tensor holds; its text is
                `refusal`.
        """
        if value is None and self.optional:
            return None
        if _beyond(value):
            raise ValueError(self.refusal(value))
        if self.choices is not None:
            # True == 1: equality alone would let a bool pass as a number.
            if value in self.choices and type(value) is type(self.choices[0]):
                return value
        elif self.type == "list":
            if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
                return tuple(value)
        elif self.type == "ints" and isinstance(value, (list, tuple)):
            if value and all(type(n) is int and not _beyond(n) and self.within(n) for n in value):
                return tuple(value)
        else:
            if self.type == "float" and type(value) is int:
                value = float(value)
            kind = {"int": int, "ints": int, "float": float, "bool": bool, "str": str}[self.type]
            right_type = type(value) is kind
            if right_type and (kind in (bool, str) or self.within(value)):
                return value
        raise ValueError(self.refusal(value))

    def refusal(self, value: Any) -> str:
        """`must be int >= 1, got 0`: what is said of a value that `accept` refuses."""
        limit = ", finite and below 2^63" if _beyond(value) else ""
        got = f"`{value:.200}`" if isinstance(value, str) else shown(value, 200)
        return f"must be {self.allowed}{limit}, got {got}"


def _beyond(value: Any) -> bool:
    """Whether a number is infinite, not a number, or larger than what is counted in."""
    if isinstance(value, float):
        return not math.isfinite(value)
    return isinstance(value, int) and abs(value) >= INT


@dataclass(frozen=True)
class Card:
    """The description and the arguments of one mechanism, metric or probe."""

    name: str
    summary: str
    text: str
    facts: dict[str, Any] = field(default_factory=dict)
    args: tuple[Arg, ...] = ()
    config: str | type | None = None
    """Where the class of its arguments is: "package.module:Class", or the class itself."""
    free: bool = False
    """A class that is named by its path and has no Config: the arguments of its constructor are not known here, so they
    are passed on as written."""

    def arg(self, name: str) -> Arg | None:
        """The argument of that name, or None."""
        return next((arg for arg in self.args if arg.name == name), None)


def read(name: str, target: str) -> Card:
    """The card of `target` ("package.module:Class"), read from its source.

    Nothing is imported: a class that the module only imports from elsewhere is followed there in the source. The name
    may come out of a file, and reading a file must not run code.

    Raises:
        CardError: there is no such module, file or class, or an argument's type is not understood.
    """
    module, _, attribute = target.partition(":")
    if module in sys.modules and not getattr(sys.modules[module], "__file__", None):
        there = vars(sys.modules[module]).get(attribute)  # a notebook's __main__
        if not isinstance(there, type):
            raise CardError(f"module `{module}` has no class `{attribute}`")
        return of_class(name, there)
    defined = home(module, attribute)
    if defined is None:
        raise CardError(f"module `{module}` has no class `{attribute}`")
    module, attribute = defined
    path = source(module)
    tree = parsed(path)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    facts: dict[str, Any] = {}
    config = None
    for node in reversed(list(_ancestry(classes[attribute], classes))):
        for key, value in _assignments(node):
            if key == "Config" and isinstance(value, ast.Name):
                config = value.id
            elif not key.startswith("_"):
                try:
                    facts[key] = ast.literal_eval(value)
                except ValueError:
                    continue  # computed: not a fact that can be read without importing
    args: tuple[Arg, ...] = ()
    where = None
    if config is not None:
        where = f"{module if config in classes else origin(tree, config, path)}:{config}"
        args = fields(where)
    text = ast.get_docstring(tree) or ast.get_docstring(classes[attribute]) or ""
    free = config is None and ":" in name
    return Card(name, _first_line(text), text, facts, args, where, free)


def docstring(module: str) -> str:
    """The docstring of a module, read from its source."""
    return ast.get_docstring(parsed(source(module))) or ""


def fields(target: str) -> tuple[Arg, ...]:
    """The fields of a dataclass "package.module:Class" as arguments, read from its source."""
    module, _, attribute = target.partition(":")
    classes = _classes(module, attribute)
    return _fields(classes[attribute], classes)


def _classes(module: str, attribute: str) -> dict[str, ast.ClassDef]:
    """A class and its ancestors by name, those included that its file imports."""
    path = source(module)
    tree = parsed(path)
    here = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found: dict[str, ast.ClassDef] = {}
    for node in _ancestry(here[attribute], here):
        found[node.name] = node
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id not in here:
                found = _classes(origin(tree, base.id, path), base.id) | found
    return found


def of_class(name: str, cls: type) -> Card:
    """The card of a class that is already there, such as one written in a notebook cell."""
    facts = {
        key: value
        for base in reversed(cls.__mro__)
        if base.__module__ != "torch.nn.modules.module"
        for key, value in vars(base).items()
        if not key.startswith("_") and _is_literal(value)
    }
    args = []
    config = getattr(cls, "Config", None)
    for item in dataclasses.fields(config) if config is not None else ():
        note = item.type if isinstance(item.type, str) else inspect.formatannotation(item.type)
        default = REQUIRED if item.default is dataclasses.MISSING else item.default
        args.append(_arg(item.name, ast.parse(note, mode="eval").body, default, ""))
    text = inspect.getdoc(cls) or ""
    return Card(name, _first_line(text), text, facts, tuple(args), config, config is None)


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0].strip()


def _is_literal(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_literal(item) for item in value)
    return isinstance(value, (str, int, float, bool, type(None)))


def _ancestry(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """The class, then its bases in the same file, nearest first."""
    yield node
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _ancestry(classes[base.id], classes)


def _assignments(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    for item in node.body:
        if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            yield item.targets[0].id, item.value
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value:
            yield item.target.id, item.value


def _fields(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> tuple[Arg, ...]:
    """The fields of a Config, inherited ones first, each with the string literal that follows it."""
    found: dict[str, Arg] = {}
    for owner in reversed(list(_ancestry(node, classes))):
        for item, after in zip(owner.body, [*owner.body[1:], None], strict=True):
            if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
                continue
            if "ClassVar" in ast.unparse(item.annotation):
                continue
            doc = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                doc = inspect.cleandoc(str(after.value.value))
            try:
                default = REQUIRED if item.value is None else ast.literal_eval(item.value)
            except ValueError:
                raise CardError(
                    f"the default of `{item.target.id}` must be a literal, "
                    f"got `{ast.unparse(item.value)}`"  # type: ignore[arg-type]
                ) from None
            found[item.target.id] = _arg(item.target.id, item.annotation, default, doc)
    return tuple(found.values())


def _arg(name: str, note: ast.expr, default: Any, doc: str) -> Arg:
    bound: str | None = None
    choices: tuple[Any, ...] | None = None
    optional = False
    while True:
        if isinstance(note, ast.BinOp) and isinstance(note.op, ast.BitOr):
            sides = [note.left, note.right]
            kept = [side for side in sides if not _is_none(side)]
            optional = optional or len(kept) < 2
            if [ast.unparse(side) for side in kept] == ["int", "tuple[int, ...]"]:
                return Arg(name, "ints", choices, optional, bound, default, doc)
            if len(kept) != 1:
                break
            note = kept[0]
        elif isinstance(note, ast.Subscript) and _name(note.value) == "Annotated":
            note, extra = note.slice.elts[:2]  # type: ignore[attr-defined]
            bound = _check_bound(name, ast.literal_eval(extra))
        elif isinstance(note, ast.Subscript) and ast.unparse(note) == "tuple[str, ...]":
            return Arg(name, "list", choices, optional, bound, default, doc)
        elif isinstance(note, ast.Subscript) and _name(note.value) == "Literal":
            value = ast.literal_eval(note.slice)
            choices = value if isinstance(value, tuple) else (value,)
            return Arg(name, type(choices[0]).__name__, choices, optional, bound, default, doc)
        elif _name(note) in TYPES:
            if bound is not None and _name(note) not in ("int", "float"):
                raise CardError(f"`{name}` is no number, so it cannot have the bound {bound!r}")
            return Arg(name, _name(note), choices, optional, bound, default, doc)
        else:
            break
    raise CardError(f"the type of `{name}` is not understood: `{ast.unparse(note)}`")


def _check_bound(name: str, bound: object) -> str:
    if isinstance(bound, str) and _BOUND.fullmatch(bound):
        return bound
    raise CardError(f"the bound of `{name}` is not understood: {bound!r}")


def _is_none(note: ast.expr) -> bool:
    return isinstance(note, ast.Constant) and note.value is None


def _name(note: ast.expr) -> str:
    """`int` of `int`, `Literal` of `typing.Literal`."""
    if isinstance(note, ast.Constant) and isinstance(note.value, str):
        return note.value
    return note.attr if isinstance(note, ast.Attribute) else getattr(note, "id", "")
