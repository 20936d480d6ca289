"""The verdict of `analyses/norms_or_attention.py` follows planted numbers."""

from __future__ import annotations

from types import ModuleType

import pandas as pd
import pytest
from scripts import script


def norm_cells(module: ModuleType, share: dict[str, float]) -> pd.DataFrame:
    """Cells of 30 layers in which each mechanism costs a share of its control, 1 nat everywhere."""
    shares = dict.fromkeys(module.CASES, 0.5) | dict.fromkeys(("zero", "mlp:zero", "skip"), 1.0)
    rows = [
        (student, layer, value * (1 + 0.01 * (layer % 3)))
        for student, value in (shares | share).items()
        for layer in range(30)
    ]
    found = pd.DataFrame(rows, columns=["student", "layer", "value"])
    return found.assign(lo=found["value"], hi=found["value"])


def norm_verdict(module: ModuleType, share: dict[str, float], norm: float) -> str:
    found = module.shares(norm_cells(module, share))
    together = pd.DataFrame(
        [(kind, norm if kind == "norm" else 1.0) for kind, _ in module.EVERYWHERE.values()],
        columns=["kind", "kl"],
    )
    together = together.assign(lo=0.9 * together["kl"], hi=1.1 * together["kl"])
    return module.verdict(found, module.summary(found), together)


def test_norms_are_easier_only_if_all_of_them_are():
    module = script("norms_or_attention")
    norms = dict.fromkeys(module.NORMS, 0.1)
    said = norm_verdict(module, norms, norm=0.1)
    assert "raw KL: holds" in said
    assert "share of what deleting costs: holds" in said
    assert "all layers at once: holds" in said
    assert "in 30 of 30 layers" in said
    said = norm_verdict(module, norms | {"norm2:dyt": 2.0}, norm=5.0)
    assert "raw KL: depends on the mechanism" in said
    assert "all layers at once: does not hold" in said
    assert "raw KL: does not hold" in norm_verdict(module, dict.fromkeys(module.NORMS, 2.0), 0.1)


def test_a_share_is_taken_of_the_control_of_the_same_place():
    module = script("norms_or_attention")
    found = module.shares(norm_cells(module, {"mlp:zero": 4.0, "norm2:dyt": 2.0}))
    share = found.groupby("student")["share"].median()
    assert share["norm2:dyt"] == pytest.approx(0.5)
    assert share["norm1:dyt"] == pytest.approx(0.5)
