"""mismatch: swap a part of a pretrained language model, see where, why and how badly it breaks, and mend it.

    import mismatch
    teacher = mismatch.load("smollm2")
    student = mismatch.swap(teacher, "layer12:infini(segment=64)")
    result = mismatch.trace(teacher, student, data="wiki", tokens=8192)

The names below are imported when they are first used: `import mismatch` alone does not import torch.
"""

from importlib import import_module as _import_module
from typing import Any as _Any

_PLACES = {
    "load": "mismatch.api",
    "generate": "mismatch.api",
    "save_checkpoint": "mismatch.api",
    "plan": "mismatch.api",
    "repair": "mismatch.api",
    "scan": "mismatch.api",
    "swap": "mismatch.api",
    "trace": "mismatch.api",
    "probe": "mismatch.api",
    "diagnose": "mismatch.api",
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
}

__all__ = sorted([*_PLACES, "__version__"])


def __getattr__(name: str) -> _Any:
    if name == "__version__":
        from mismatch.runs.environment import versions

        return versions()["mismatch"]
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _import_module(_PLACES[name])
    value = module if name == "errors" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
