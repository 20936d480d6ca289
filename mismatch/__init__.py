"""mismatch: swap a part of a pretrained language model, see where, why and how badly it breaks, and mend it.

    import mismatch
    teacher = mismatch.load("smollm2")
    student = mismatch.swap(teacher, "layer12:infini(segment=64)")
    result = mismatch.trace(teacher, student, data="wiki", tokens=8192)

The names below are imported when they are first used: `import mismatch` alone does not import torch.
"""

import sys as _sys
from importlib import import_module as _import_module
from importlib.metadata import version as _version
from types import ModuleType as _ModuleType
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
    "fetch": "mismatch.fetch",
    "load_run": "mismatch.run",
    "compare": "mismatch.report",
    "explain": "mismatch.catalog",
    "list_mechanisms": "mismatch.catalog",
    "list_metrics": "mismatch.catalog",
    "list_probes": "mismatch.catalog",
    "measure": "mismatch.metrics",
}

__all__ = sorted([*_PLACES, "__version__"])


def __getattr__(name: str) -> _Any:
    if name == "__version__":
        return _version("mismatch")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _import_module(_PLACES[name])
    value = module if name == "fetch" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Fetch(_ModuleType):
    """`mismatch.fetch` is both a module and, in the public API, a function: the module can be called."""

    def __call__(self, *args: _Any, **kwargs: _Any) -> _Any:
        return self.fetch(*args, **kwargs)


class _Package(_ModuleType):
    def __setattr__(self, name: str, value: _Any) -> None:
        if name == "fetch" and isinstance(value, _ModuleType):  # what importing the submodule does
            value.__class__ = _Fetch
        super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Package
