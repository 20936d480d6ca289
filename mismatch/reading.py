"""Files from outside: size, syntax and types are checked here, where they enter. No torch.

A file is data: it may be broken, enormous or made to harm, and reading it runs nothing. Every reader asks `text`,
`json_of` or `yaml_of` for what a file holds and `typed` for whether it fits, and each raises its own error class with
the file, the field, what was found and what is meant.
"""

from __future__ import annotations

import dataclasses
import json
import math
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

import yaml

from mismatch.errors import MismatchError

T = TypeVar("T")

BYTES = 64 * 2**20
"""Largest text file that is read, but for YAML: a plan of a long repair has 2 MB."""
YAML_BYTES = 2**18
"""Largest YAML file: its reader takes seconds for a megabyte."""
DEEP = 64
"""Lists and mappings inside one another in a file."""
INT = 2**63
"""Whole numbers are below this: what torch, numpy and pyarrow count in."""


def text(path: Path, error: type[MismatchError], *, limit: int = BYTES) -> str:
    """The text of a file.

    Raises:
        error: it is not there, not an ordinary file (a FIFO would wait for ever), too large, or not UTF-8.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{path} is not an ordinary file")
        if found.st_size > limit:
            raise error(
                f"{path} has {found.st_size:,} bytes, more than the {limit:,} that are read"
            )
        return path.read_bytes().decode()
    except OSError as cause:
        raise error(f"cannot read {path}: {cause.strerror}") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not UTF-8 text: byte {cause.start}") from cause
    except ValueError as cause:  # a NUL in the path
        raise error(f"cannot read {str(path)!r}: {cause}") from cause


def json_of(path: Path, error: type[MismatchError]) -> Any:
    """What a JSON file holds.

    Raises:
        error: as `text`, or not JSON, or nested deeper than `DEEP`.
    """
    try:
        found = json.loads(text(path, error))
    except (ValueError, RecursionError) as cause:  # also a number of more than 4,300 digits
        reason = "nested too deeply" if isinstance(cause, RecursionError) else cause
        raise error(f"{path} is not valid JSON: {reason}") from cause
    if _depth(found) > DEEP:
        raise error(f"{path} is not valid JSON: nested too deeply")
    return found


def yaml_of(
    path: Path, error: type[MismatchError], loader: type[yaml.SafeLoader] | None = None
) -> Any:
    """What a YAML file holds.

    Raises:
        error: as `text`, or not YAML, with aliases, with a key twice, or nested deeper than `DEEP`.
    """
    try:
        return yaml.load(text(path, error, limit=YAML_BYTES), loader or PlainYaml)
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        reason = getattr(cause, "problem", None) or next(iter(str(cause).splitlines()), "")
        raise error(f"{path} is not YAML{line}: {reason}") from cause
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as cause:
        # Tagged values that are not what their tag says, such as `!!int x`.
        raise error(f"{path} is not YAML: {str(cause) or type(cause).__name__:.200}") from cause


class PlainYaml(yaml.SafeLoader):
    """YAML without aliases, which can stand for more than any memory holds, and without a key twice."""

    deep = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not read", mark)
        if self.deep >= DEEP:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "nested too deeply", mark)
        self.deep += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.deep -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word", key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{key_node.value}` is there twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _depth(data: Any) -> int:
    """How deeply lists and mappings are nested; without recursion."""
    depth, level = 0, [data]
    while level:
        inside = [x for x in level if isinstance(x, (dict, list))]
        level = [x for one in inside for x in (one.values() if isinstance(one, dict) else one)]
        depth += bool(inside)
    return depth


def typed(kind: type[T] | Any, data: Any, refuse: Callable[[str], Exception]) -> T:
    """Plain values as a type: dataclasses, TypedDicts, tuples, lists, dicts, `X | None`, numbers, words.

    Args:
        kind: what is meant. A null where a float is meant is NaN, which JSON does not have; keys that the type does not
            have are left out of a dataclass and kept in a TypedDict.
        data: what a file holds.
        refuse: makes the error from "`clauses[1].state` is missing" or "`layer` must be int, got '2'".
    """
    try:
        found: T = _read(kind, data, "")
    except Unfit as unfit:
        raise refuse(str(unfit)) from None
    return found


class Unfit(Exception):
    """A value of another type than its field."""


def _read(kind: Any, data: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin in (UnionType, Union):
        return _either(args, data, where)
    if origin is Literal:
        if any(data == one and type(data) is type(one) for one in args):
            return data
        raise _unfit("one of " + ", ".join(map(str, args)), data, where)
    if isinstance(data, dict):
        if is_typeddict(kind):
            return data | _fields(get_type_hints(kind), kind.__required_keys__, data, where)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            known = [field for field in dataclasses.fields(kind) if field.init]
            needed = {
                f.name
                for f in known
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            }
            hints = get_type_hints(kind)
            return kind(**_fields({f.name: hints[f.name] for f in known}, needed, data, where))
        if (origin or kind) in (dict, Mapping):
            of = args[1] if args else Any
            return {key: _read(of, value, f"{where}.{key}") for key, value in data.items()}
    if origin in (tuple, list) and isinstance(data, (list, tuple)):
        inner = args[:1] * len(data) if origin is list or args[-1] is ... else args
        if len(inner) == len(data):
            found = (
                _read(t, x, f"{where}[{i}]")
                for i, (t, x) in enumerate(zip(inner, data, strict=True))
            )
            return origin(found)
    if kind is float and (data is None or type(data) in (int, float)):
        return math.nan if data is None else _float(data, where)
    if isinstance(kind, type) and type(data) is kind and (kind is not int or _counted(data)):
        return data
    raise _unfit(getattr(kind, "__name__", str(kind)), data, where)


def _either(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    """The first of several types that fits; the error is that of the first."""
    if data is None and type(None) in kinds:
        return None
    first: Unfit | None = None
    for kind in kinds:
        try:
            return _read(kind, data, where)
        except Unfit as unfit:
            first = first or unfit
    assert first is not None
    raise first


def _counted(number: Any) -> bool:
    return bool(abs(number) < INT)


def _float(data: float, where: str) -> float:
    try:
        return float(data)
    except OverflowError:
        raise _unfit("float", data, where) from None


def _fields(
    kinds: Mapping[str, Any], needed: Any, data: Mapping[str, Any], where: str
) -> dict[str, Any]:
    for name in kinds:
        if name in needed and name not in data:
            raise Unfit(f"`{f'{where}.{name}'.lstrip('.')}` is missing")
    return {
        name: _read(kind, data[name], f"{where}.{name}")
        for name, kind in kinds.items()
        if name in data
    }


def _unfit(wanted: str, got: Any, where: str) -> Unfit:
    field = f"`{where.lstrip('.'):.120}`" if where else "it"
    return Unfit(f"{field} must be {wanted}, got {shown(got)}")


def shown(value: Any, limit: int = 60) -> str:
    """A value in an error, however long it is."""
    try:
        found = repr(value)
    except ValueError:  # Python does not print numbers of more than 4,300 digits
        return "a number of more than 4,300 digits"
    return found if len(found) <= limit else f"{found[:limit]}..."
