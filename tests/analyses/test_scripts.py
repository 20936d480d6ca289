"""Every script of analyses/: it answers --help at once, and says first what it needs besides what `make` installs."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from scripts import ANALYSES, script

import mismatch

SCRIPTS = sorted(ANALYSES.glob("*.py"))
NAMES = [path.stem for path in SCRIPTS]
INSTALLED = {  # by `make`: imports of the dependencies in pyproject.toml
    *("matplotlib", "mismatch", "nnsight", "numpy", "pandas", "scipy", "torch", "tqdm"),
    "transformers",
}
NEEDS = {("benchmark_trace", "cka")}
"""What a script imports besides, and says so before it loads a model."""


@pytest.mark.parametrize("name", NAMES)
def test_help_comes_before_any_work(name, monkeypatch, capsys):
    monkeypatch.setattr(mismatch, "load", lambda *a, **k: pytest.fail("loaded a model"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        script(name).main()
    assert end.value.code == 0
    assert f"python analyses/{name}.py" in capsys.readouterr().out


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_it_imports_what_make_installs(path: Path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    besides = imported - INSTALLED - set(sys.stdlib_module_names)
    assert {(path.stem, module) for module in besides} <= NEEDS


def test_what_is_missing_is_named_before_the_model_is_loaded(monkeypatch, capsys):
    module = script("benchmark_trace")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.mismatch, "load", lambda *a, **k: pytest.fail("loaded a model"))
    monkeypatch.setattr(sys, "argv", ["benchmark_trace.py", "time"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "error: `time` compares with pytorch-cka, which is not installed" in said
    assert "pip install -c constraints.txt pytorch_cka" in said
