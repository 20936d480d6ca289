"""Names of mechanisms, metrics and probes: tables of strings "module:attr", so that looking up a name imports nothing.

To add one, write its file and one line in the table of `mismatch/mechanisms/__init__.py`,
`mismatch/metrics/__init__.py` or `mismatch/probes/__init__.py`. Another package adds its own through
the entry point groups `mismatch.mechanisms`, `mismatch.metrics` and `mismatch.probes`; a notebook
through `mechanisms().add(name, target)`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mismatch.errors import MismatchError, UsageError
from mismatch.registry.card import Card, of_class, read
from mismatch.registry.source import CardError, NoModule

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
"""A registered name: the noun in lower snake case."""

IMPORTABLE = (
    "Python must be able to import it: install its package, or put its folder on PYTHONPATH"
)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """`did you mean `x`? available: x, y`: the hint for a word that is not among the names."""
    names = sorted(names)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    start = f"did you mean `{near[0]}`? " if near else ""
    return f"{start}available: {', '.join(names)}"


class Registry:
    """One table of names.

    Args:
        kind: what the names stand for, in the singular, as errors call it ("mechanism").
        table: name -> "module:attr", or "module:attr" of such a table, imported when first asked for.
        entry_point_group: where other packages announce theirs.
    """

    def __init__(self, kind: str, table: Mapping[str, str] | str, entry_point_group: str) -> None:
        self.kind = kind
        self.entry_point_group = entry_point_group
        self._table = table
        self._added: dict[str, str | type] = {}

    @functools.cached_property
    def _known(self) -> dict[str, str | type]:
        table: Mapping[str, str]
        table = load(self._table) if isinstance(self._table, str) else self._table
        known: dict[str, str | type] = {}
        for name, target in table.items():
            self._check(name, target, known)
            known[name] = target
        for entry in importlib.metadata.entry_points(group=self.entry_point_group):
            self._check(entry.name, entry.value, known)
            known[entry.name] = entry.value
        return known

    def _check(self, name: str, target: str | type, known: Mapping[str, str | type]) -> None:
        if not NAME.fullmatch(name):
            raise UsageError(
                f"`{name}` cannot name a {self.kind}",
                hint="use lower case words joined by `_`, such as `sliding_window`",
            )
        if name in known:
            raise UsageError(
                f"the {self.kind} `{name}` is registered twice: `{known[name]}` and `{target}`",
                hint="give one of them another name",
            )
        if isinstance(target, str) and not re.fullmatch(r"[\w.]+:\w+", target):
            raise UsageError(
                f"the {self.kind} `{name}` points at `{target}`",
                hint="write `package.module:Class`",
            )

    def add(self, name: str, target: str | type) -> None:
        """Register a class, or "module:attr", for this process: for a notebook or a test.

        Adding a name of the table is an error; adding one's own name again replaces it, since a
        notebook cell runs more than once.
        """
        self._check(name, target, self._known)
        self._added[name] = target

    def names(self) -> tuple[str, ...]:
        """Every name, sorted."""
        return tuple(sorted({**self._known, **self._added}))

    def __contains__(self, name: object) -> bool:
        return name in self._added or name in self._known

    def target(self, name: str, error: type[MismatchError] = UsageError) -> str | type:
        """What the name stands for: a class, or "module:attr". A "module:attr" stands for itself.

        Raises:
            error: no such name.
        """
        if ":" in name:
            return name
        if name not in self:
            raise error(f"unknown {self.kind} `{name}`", hint=did_you_mean(name, self.names()))
        return self._added.get(name) or self._known[name]

    def get(self, name: str, error: type[MismatchError] = UsageError) -> type:
        """The class behind the name. Imports its file.

        Raises:
            error: no such name, or its module or class does not exist.
        """
        target = self.target(name, error)
        if not isinstance(target, str):
            return target
        try:
            return load(target)
        except (AttributeError, ModuleNotFoundError) as cause:
            raise error(f"the {self.kind} `{name}` cannot be loaded: {cause}") from cause
        except Exception as cause:
            raise error(
                f"the {self.kind} `{name}` cannot be loaded: {type(cause).__name__}: {cause}"
            ) from cause

    def card(self, name: str, error: type[MismatchError] = UsageError) -> Card:
        """The card of the name. Imports nothing: the file is read as text.

        Raises:
            error: no such name, or a file without a readable card.
        """
        target = self.target(name, error)
        try:
            if isinstance(target, str):
                return read(name, target)
            return of_class(name, target)
        except CardError as cause:
            raise error(
                f"the {self.kind} `{name}` cannot be used: {cause}",
                hint=IMPORTABLE if isinstance(cause, NoModule) and ":" in name else None,
            ) from cause

    def config(self, name: str, error: type[MismatchError] = UsageError) -> type:
        """The class of its settings. Imports only the file that this class is in.

        Raises:
            error: as `card`; it has no Config.
        """
        where = self.card(name, error).config
        if where is None:
            raise error(f"the {self.kind} `{name}` has no Config")
        return load(where) if isinstance(where, str) else where


def load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


@functools.cache
def mechanisms() -> Registry:
    """What can go into a slot."""
    return Registry("mechanism", "mismatch.mechanisms:MECHANISMS", "mismatch.mechanisms")


@functools.cache
def metrics() -> Registry:
    """What can be measured at a site."""
    return Registry("metric", "mismatch.metrics:METRICS", "mismatch.metrics")


@functools.cache
def probes() -> Registry:
    """What a model can be asked, each on inputs made for one question."""
    return Registry("probe", "mismatch.probes:PROBES", "mismatch.probes")


@functools.cache
def stages() -> Registry:
    """What a command does."""
    return Registry("stage", "mismatch.stages:STAGES", "mismatch.stages")


def read_card(name: str) -> Card:
    """The card of the metric or probe that a row of the table names.

    Raises:
        UsageError: neither has this name.
    """
    return (probes() if name in probes() else metrics()).card(name)
