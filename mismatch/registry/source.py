"""The source of a class that is named by its path, "package.module:Class", found and read without importing anything.

The name may come out of a file, and reading a file must not run code.
"""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import importlib.util
from pathlib import Path


class CardError(Exception):
    """A file whose card cannot be read. The caller names the mechanism, metric or probe and raises its own error."""


class NoModule(CardError):
    """Python does not find the module."""


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file. A file that changed since is read again."""
    found = path.stat()
    return _parsed_at(path, found.st_mtime_ns, found.st_size)


@functools.cache
def _parsed_at(path: Path, _changed: int, _size: int) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        raise CardError(f"`{path}` line {error.lineno}: {error.msg}") from error


def home(module: str, attribute: str, seen: frozenset[str] = frozenset()) -> tuple[str, str] | None:
    """The module that defines a class, and its name there, along `from ... import` in the source; None: nowhere."""
    if module in seen:
        return None
    path = source(module)
    tree = parsed(path)
    if any(isinstance(node, ast.ClassDef) and node.name == attribute for node in tree.body):
        return module, attribute
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            if alias.name == "*" or (alias.asname or alias.name) == attribute:
                named = attribute if alias.name == "*" else alias.name
                try:
                    found = home(_absolute(node, module, path), named, seen | {module})
                except NoModule:  # of a star, or written in another language
                    continue
                if found is not None:
                    return found
    return None


def _absolute(node: ast.ImportFrom, module: str, path: Path) -> str:
    """The full name of the module that a line `from .x import y` in a module means."""
    if not node.level:
        return str(node.module)
    parts = module.split(".")
    kept = len(parts) - node.level + (path.name == "__init__.py")
    return ".".join([*parts[:kept], *filter(None, [node.module])])


def origin(tree: ast.Module, config: str, path: Path) -> str:
    """The module that a file imports a class from."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and config in [alias.name for alias in node.names]:
            return str(node.module)
    raise CardError(f"the class `{config}` is neither in `{path}` nor imported there")


def source(module: str) -> Path:
    """The file of a module. Imports nothing: not even the packages around it."""
    first, *rest = module.split(".")
    if not first:
        raise NoModule(f"there is no module `{module}`")
    try:
        found = importlib.util.find_spec(first)
    except ValueError:  # a module without a __spec__, such as a notebook's __main__
        found = None
    full = first
    for part in rest:
        if found is None or found.submodule_search_locations is None:
            raise NoModule(f"there is no module `{module}`")
        full = f"{full}.{part}"
        places = [str(place) for place in found.submodule_search_locations]
        found = importlib.machinery.PathFinder.find_spec(full, places)
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        raise NoModule(f"there is no module `{module}`")
    return Path(found.origin)
