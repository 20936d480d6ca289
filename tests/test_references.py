"""Names of modules and files in the package's own text exist: none is left over from before a move."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import mismatch

ROOT = Path(mismatch.__file__).parent
REPOSITORY = ROOT.parent
FILES = sorted(ROOT.rglob("*.py"))
CARDS = [path for path in FILES if path.name == "__init__.py"]
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
DOTTED = re.compile(r"`(mismatch(?:\.\w+)+)")
PATH = re.compile(r"\b(?:mismatch|analyses|tests)/[\w/]+\.\w+")
FILE_OF_CARD = re.compile(r"\b\w+\.py\b")
NO_MODULES = {"mismatch.json", "mismatch.NAME"}  # a file of a checkpoint, a placeholder


@cache
def names_of(path: Path) -> frozenset[str]:
    """What a file defines or imports at its top level, and the members of its classes as `Class.member`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            members = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            found |= {node.name, *(f"{node.name}.{member}" for member in members)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(found)


def exists(name: str) -> bool:
    """Whether `mismatch.a.b.c` is a module, or a name in one; public names are those of `mismatch` itself."""
    parts = name.split(".")[1:]
    if len(parts) == 1 and parts[0] in mismatch.__all__:
        return True
    for end in range(len(parts), -1, -1):
        folder = ROOT.joinpath(*parts[:end])
        rest = ".".join(parts[end:])
        for path in (folder.with_suffix(".py"), folder / "__init__.py"):
            if path.is_file():
                return not rest or rest in names_of(path)
    return False


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_named_modules_exist(path):
    text = path.read_text(encoding="utf-8")
    assert [n for n in DOTTED.findall(text) if n not in NO_MODULES and not exists(n)] == []
    assert [n for n in PATH.findall(text) if not (REPOSITORY / n).exists()] == []


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_a_folder_names_files_that_it_has(path):
    card = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    own = PATH.sub("", card)
    assert [n for n in FILE_OF_CARD.findall(own) if not (path.parent / n).is_file()] == []


def test_what_is_found():
    for name in ("mismatch.runs.table", "mismatch.spec.resolve", "mismatch.trace"):
        assert exists(name)
    assert exists("mismatch.models.layout.Layout.of")
    for name in ("mismatch.table", "mismatch.runs.tables", "mismatch.models.layout.Layout.off"):
        assert not exists(name)
