"""Scripts of `analyses/` as modules: they are no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ANALYSES = Path(__file__).resolve().parents[1] / "analyses"


# A script may import one beside it, as it can when it is run.
sys.path.append(str(ANALYSES))


def script(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, ANALYSES / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # a dataclass looks up the module of its annotations
    found.loader.exec_module(module)
    return module
