"""What a person means by a value of another type: flags, YAML and Python alike. No torch.

Text of a number (`4k`, `1e-3`), a path, a number of numpy, any row of words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from mismatch.registry.card import Arg

REPEATED = ("swap", "trainer")
"""Lists whose flag may be repeated, and whose text is not divided at commas: they have a meaning of their own."""

_NUMBER = re.compile(r"([+-]?(?:\d{1,40}\.?\d{0,40}|\.\d{1,40})(?:[eE][+-]?\d{1,3})?)([kM]?)")
_MANY = {"": 1, "k": 1000, "M": 1_000_000}  # 64k, 1M: counts of tokens


def meant(arg: Arg, value: Any, *, path: bool = False) -> Any:
    """The value in the type of its argument, where that is clear; what fits nothing is left for `Arg.accept`.

    Args:
        arg: the argument.
        value: what was given.
        path: it can be a path: `~` in front is the home folder.

    Raises:
        ValueError: text that no file and no path can hold, or the home folder of nobody.
    """
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # a number of numpy or torch
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and not _writable(value):
        raise ValueError(f"must be text in Unicode without control characters, got {value!a:.200}")
    if arg.type == "list":
        return _words(value, apart=arg.name not in REPEATED)
    if arg.optional and isinstance(value, str) and value == "none":
        return None
    if arg.type in ("int", "float") and arg.choices is None:
        return _number(arg.type, value)
    if path and isinstance(value, str) and value.startswith("~"):
        try:
            return str(Path(value).expanduser())
        except RuntimeError:
            raise ValueError(f"names the home folder of nobody: {value:.80}") from None
    return value


def _words(value: Any, *, apart: bool) -> Any:
    """A row of words: one text, divided at commas unless it is a swap, or anything that can be gone through."""
    if isinstance(value, str):
        if not apart:
            return (value,)
        return () if value == "none" else tuple(part.strip() for part in value.split(","))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = (value,)
    if (
        value is None
        or isinstance(value, (Mapping, bytes, bool))
        or not isinstance(value, Iterable)
    ):
        return value
    return tuple(
        str(word) if isinstance(word, (str, Path)) or _is_number(word) else word for word in value
    )


def _is_number(value: Any) -> bool:
    value = value.item() if getattr(value, "shape", None) == () else value
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(kind: str, value: Any) -> Any:
    if isinstance(value, str) and (found := _NUMBER.fullmatch(value.strip())):
        exact = Decimal(found[1]) * _MANY[found[2]]
        if kind == "float":
            return float(exact)
        return int(exact) if exact == exact.to_integral_value() else value
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _writable(text: str) -> bool:
    """Whether a text can be written into a file and a path: bytes of another encoding cannot."""
    return "\0" not in text and not any("\ud800" <= sign <= "\udfff" for sign in text)
