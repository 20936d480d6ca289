"""mismatch: swap a module of a pretrained language model, see where, why and how badly it breaks, and repair it.

    import mismatch
    teacher = mismatch.load("smollm2")
    student = mismatch.swap(teacher, "layer12:infini(segment=64)")
    result = mismatch.trace(teacher, student, data="wiki", tokens=8192)

The names below, and a function for each stage (trace, probe, diagnose, scan, plan, repair, train), are imported when
they are first used: `import mismatch` alone does not import torch. `__init__.pyi` has their signatures.
"""

from importlib import import_module as _import_module
from typing import Any as _Any

from mismatch.registry import stages as _stages
from mismatch.stages import STAGES as _STAGES

_PLACES = {
    "load": "mismatch.api",
    "generate": "mismatch.api",
    "save_checkpoint": "mismatch.api",
    "save_merged": "mismatch.api",
    "swap": "mismatch.api",
    "check": "mismatch.api",
    "open_nnsight": "mismatch.api",
    "fetch": "mismatch.texts.demo.fetch",
    "load_run": "mismatch.runs.folder",
    "compare": "mismatch.stages.trace.report.comparison",
    "errors": "mismatch.errors",
    "explain": "mismatch.registry.explain",
    "list_mechanisms": "mismatch.registry.explain",
    "list_metrics": "mismatch.registry.explain",
    "list_probes": "mismatch.registry.explain",
    "measure": "mismatch.metrics",
    "spec": "mismatch.spec",
    "versions": "mismatch.runs.environment",
    # What a run is made of: text in windows, the model's modules, values at its sites, held-out numbers.
    "read_documents": "mismatch.texts.documents:read",
    "windows": "mismatch.texts.windows",
    "layout_of": "mismatch.surgery.operate",
    "taps": "mismatch.forward.sites",
    "run_tapped": "mismatch.forward.hooks:run",
    "HeldOut": "mismatch.forward.heldout",
    # In somebody else's training.
    "DriftCallback": "mismatch.stages.train.drift",
    # What the functions take and return.
    "Teacher": "mismatch.surgery.students",
    "Student": "mismatch.surgery.operate",
    "Diagnosed": "mismatch.stages.diagnose.result",
    "Planned": "mismatch.stages.plan.result",
    "Probed": "mismatch.stages.probe.result",
    "Repaired": "mismatch.stages.repair.result",
    "Scanned": "mismatch.stages.scan.result",
    "Trained": "mismatch.stages.train.result",
    "Traced": "mismatch.stages.trace.result",
}
"""Name -> where it is: a module that has it, "module:its name there", or the module of that name itself."""

__all__ = sorted([*_PLACES, *_STAGES, "__version__"])


def __getattr__(name: str) -> _Any:
    if name == "__version__":
        return str(_import_module("mismatch.runs.environment").versions()["mismatch"])
    if name in _PLACES:
        place, _, there = _PLACES[name].partition(":")
        value = _import_module(place)
        if place != f"{__name__}.{name}":
            value = getattr(value, there or name)
        globals()[name] = value
        return value
    if not name.startswith("_") and name in _stages():
        return _import_module("mismatch.stages.functions").function(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
