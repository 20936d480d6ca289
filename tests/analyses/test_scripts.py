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
BESIDE = {path.stem for path in SCRIPTS}
INSTALLED = {  # by `make`: imports of the dependencies in pyproject.toml
    *(
        "matplotlib",
        "mismatch",
        "nnsight",
        "numpy",
        "pandas",
        "pyarrow",
        "safetensors",
        "scipy",
        "torch",
    ),
    *("tqdm", "transformers", "yaml"),
}
PUBLIC = {
    *("mismatch.errors", "mismatch.registry", "mismatch.report.style", "mismatch.spec"),
    # What a plug-in is written with.
    *("mismatch.mechanisms.base", "mismatch.mechanisms.parts.calling"),
    *("mismatch.metrics.base", "mismatch.probes.base"),
}
"""Modules for users, beside the names of `mismatch` itself."""
INSIDE = {
    "benchmark_gpu": "reads the peak of memory as a manifest has it",
    "benchmark_repair": "times the steps of a repair one by one",
    "benchmark_scan": "times a scan against the blocks it has to run",
    "benchmark_trace": "times a trace against the work it cannot avoid",
    "bounded_state": "generates from the prompts of a probe",
    "forecast_record": "reads what a repair knows before it trains",
    "forecast_score": "tests the forecast of a repair",
    "harness": "reads the demo text as it lies",
    "infini_options": "trains many forms on one pass of the teacher, and counts all against one swap",
    "initial_values": "trains many arms on one pass of the teacher, and counts all against one control",
    "interval_coverage": "names what the table says that intervals are over",
    "long_context": "reads the demo text as it lies, and the peak of memory",
    "malformed_inputs": "fetches the model that it spoils",
    "mechanism_costs": "counts models that have no weights",
    "mechanism_table": "one sweep of cells that no scan asks for",
    "one_or_all": "one sweep of sets of layers",
    "probe_nulls": "puts probes to models that are no swap",
    "three_models": "applies the rules of a scan and of a trace to other models",
    "repair_layer12": "draws two repairs into one figure",
    "smaller_cache": "fits many forms on one pass of the teacher",
    "spoilt_inputs": "runs the command line in its own process",
    "selector_study": "measures many sets in one sweep, and keeps what single documents lost",
    "selectors_repaired": "puts the questions of a plan to a repaired student",
    "scan_atlas": "says what the report of a scan says",
}
"""Scripts that import more of the package than a user needs, and why."""
NEEDS = {("benchmark_trace", "cka"), ("harness", "datasets"), ("harness", "lm_eval")}
"""What a script imports besides, and says so before it loads a model."""


@pytest.mark.parametrize("name", [p.stem for p in SCRIPTS if "def main(" in p.read_text("utf-8")])
def test_help_comes_before_any_work(name, monkeypatch, capsys):
    monkeypatch.setattr(mismatch, "load", lambda *a, **k: pytest.fail("loaded a model"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        script(name).main()
    assert end.value.code == 0
    assert f"python analyses/{name}.py" in capsys.readouterr().out


def imports(path: Path) -> set[str]:
    """Every module that a file imports; `from mismatch import x` is "mismatch.x" where that is no public name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            if node.module == "mismatch":
                found |= {name for name in inside if name.split(".")[1] not in mismatch.__all__}
            else:
                found |= inside & PUBLIC or {node.module}
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_it_imports_what_make_installs(path: Path):
    besides = (
        {name.split(".")[0] for name in imports(path)}
        - INSTALLED
        - BESIDE
        - sys.stdlib_module_names
    )
    assert {(path.stem, module) for module in besides} <= NEEDS


def test_scripts_use_what_users_have_but_for_those_that_look_inside():
    ours = {path.stem: {n for n in imports(path) if n.startswith("mismatch.")} for path in SCRIPTS}
    assert {name for name, modules in ours.items() if modules - PUBLIC} == set(INSIDE)


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
