"""The verdict of `analyses/parallel_alpha.py` follows planted numbers."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from scripts import script


def alphas(module: ModuleType, scale: dict[str, float], at_0: float = 0.0) -> pd.DataFrame:
    """KL = scale * alpha^2 at each layer, intervals of 10 %."""
    rows = []
    for inner, factor in scale.items():
        for layer in (4, 12):
            for alpha in module.grid(inner):
                kl = factor * alpha**2 if alpha else at_0
                rows.append((inner, "beside", alpha, layer, kl))
            if inner != "identity":
                rows.append((inner, "replaced", np.nan, layer, 2 * factor))
            rows.append((inner, "zero", np.nan, layer, 0.05))
    found = pd.DataFrame(rows, columns=["inner", "how", "alpha", "layer", "value"])
    return found.assign(lo=0.9 * found["value"], hi=1.1 * found["value"])


def test_the_alpha_at_the_mark_is_found_with_its_interval():
    module = script("parallel_alpha")
    found = alphas(module, {"random": 4.0})
    row = module.crossings(found).iloc[0]
    assert row["alpha"] == pytest.approx(0.05, rel=1e-6)  # 4 alpha^2 = 0.01
    assert row["lo"] == pytest.approx(0.05 / 1.1**0.5, rel=1e-6)
    assert row["hi"] == pytest.approx(0.05 / 0.9**0.5, rel=1e-6)
    assert row["power"] == pytest.approx(2, rel=1e-3)


def test_an_alpha_off_the_grid_is_said_to_be():
    module = script("parallel_alpha")
    never, at_once = module.crossings(alphas(module, {"infini": 1e-6, "random": 1e6}))["alpha"][::4]
    assert never == np.inf
    assert at_once == 0


def test_alpha_0_and_what_alpha_depends_on():
    module = script("parallel_alpha")
    same = alphas(module, {"random": 4.0, "mamba2": 4.0})
    apart = alphas(module, {"random": 4.0, "mamba2": 0.4})
    broken = alphas(module, {"random": 4.0}, at_0=1e-9)
    said = [module.verdict(found, module.crossings(found)) for found in (same, apart, broken)]
    assert "keeps the model: holds" in said[0]
    assert "is the same everywhere" in said[0]
    assert "depends on mechanism and layer" in said[1]
    assert "keeps the model: does not hold" in said[2]
    assert "less than in place of the attention in 4 of 4 cells" in said[0]
