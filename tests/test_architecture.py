"""The house rules: who may import whom, how large a file may be, and that every registered name is there."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import mismatch
from mismatch.registry import mechanisms, metrics, probes

ROOT = Path(mismatch.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def test_import_contracts():
    """Those of pyproject.toml: layers, independence, one file imports nnsight, torch-free modules."""
    # Its command line, not its API: that one changes the log settings of the whole process.
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"),
            *("--no-cache", "--config", str(ROOT.parent / "pyproject.toml")),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_is_of_a_size_that_can_be_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("registry", [mechanisms(), metrics(), probes()], ids=lambda r: r.kind)
def test_every_registered_name_resolves(registry):
    base = importlib.import_module(f"mismatch.{registry.kind}s.base")
    for name in registry.names():
        assert issubclass(registry.get(name), getattr(base, registry.kind.capitalize()))


@pytest.mark.parametrize("registry", [mechanisms(), metrics(), probes()], ids=lambda r: r.kind)
def test_a_card_says_what_the_class_says(registry):
    """The card is read as text; what it says must be what Python makes of the same file."""
    for name in registry.names():
        cls, card = registry.get(name), registry.card(name)
        assert card.text == (sys.modules[cls.__module__].__doc__ or "").strip()
        for fact, value in card.facts.items():
            assert getattr(cls, fact) == value, f"{name}.{fact}"
        if card.args:
            given = {
                arg.name: arg.default
                for arg in card.args
                if isinstance(arg.default, (int, float, str))
            }
            made = cls.Config.__dataclass_fields__
            assert list(made) == [arg.name for arg in card.args]
            assert given == {key: made[key].default for key in given}


def test_one_file_one_name():
    """A mechanism, metric or probe is one file and one line in a table; no file of the folder is left out."""
    for registry in (mechanisms(), metrics(), probes()):
        targets = [registry.target(name) for name in registry.names()]
        modules = [target.split(":")[0] for target in targets]
        assert len(set(modules)) == len(modules)
        assert [module.rsplit(".", 1)[1] for module in modules] == list(registry.names())
        shared = {path.stem for path in (ROOT / f"{registry.kind}s").glob("*.py")} - set(
            registry.names()
        )
        for stem in shared - {"__init__"}:
            tree = ast.parse(
                (ROOT / f"{registry.kind}s" / f"{stem}.py").read_text(encoding="utf-8")
            )
            facts = [
                target.id
                for node in tree.body
                if isinstance(node, ast.ClassDef)
                for item in node.body
                if isinstance(item, ast.Assign)
                for target in item.targets
                if isinstance(target, ast.Name)
            ]
            assert "source" not in facts, (
                f"{stem}.py looks like a {registry.kind} that is in no table"
            )
