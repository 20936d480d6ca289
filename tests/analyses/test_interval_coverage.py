"""`analyses/interval_coverage.py`: what it draws from, and that intervals hold the true number as often as it says."""

from __future__ import annotations

from itertools import islice

import pandas as pd
import pytest
from scripts import ANALYSES, script

STORED = ANALYSES.parent / "figures" / "interval_coverage"


@pytest.fixture(scope="module")
def module():
    return script("interval_coverage")


@pytest.fixture(scope="module")
def values():
    return pd.read_csv(STORED / "values.csv")


def least(found: pd.DataFrame, lengths: str, units: int) -> float:
    """Over the five numbers, of intervals over documents."""
    at = (found["over"] == "documents") & (found["lengths"] == lengths) & (found["units"] == units)
    mine = found[at & (found["method"] == "ours")]
    assert len(mine) == 5
    return float(mine["covers"].min())


@pytest.fixture(scope="module")
def stored():
    return pd.read_csv(STORED / "coverage.csv")


def test_documents_are_drawn_of_equal_or_unequal_length(module, values):
    wiki = values[values["text"] == "wiki"]
    equal, chance = module._pool(wiki, "equal")
    assert chance.sum() == pytest.approx(1) and len(set(chance)) == 1
    two = wiki[wiki["window"] < 2].groupby("document")["tokens"].agg(["sum", "size"])
    assert sorted(equal["tokens"]) == sorted(two.loc[two["size"] == 2, "sum"])
    unequal, chance = module._pool(wiki, "unequal")
    assert len(unequal) == len(wiki) and chance.sum() == pytest.approx(1)


def test_the_stored_coverage_is_what_is_claimed(stored):
    assert least(stored, "equal", 8) >= 0.93 and least(stored, "unequal", 8) >= 0.90
    assert (
        min(least(stored, which, n) for which in ("equal", "unequal") for n in (4, 16, 32)) > 0.93
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_coverage_again(module, values, stored):
    found = module.coverage(values, seed=1)
    assert least(found, "equal", 8) >= 0.93 and least(found, "unequal", 8) >= 0.90
    both = found.merge(stored, on=["over", "lengths", "units", "number", "method"])
    assert len(both) == len(stored)
    assert (both["covers_x"] - both["covers_y"]).abs().max() < 0.03


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_stored_values_are_those_of_the_model(module, values):
    for row in islice(module.rows_of("wiki"), 4):
        at = (values["document"] == row["document"]) & (values["window"] == row["window"])
        (kept,) = values[at].to_dict("records")
        assert kept["tokens"] == row["tokens"]
        assert kept["kl_infini"] == pytest.approx(row["kl_infini"], rel=1e-3)
        assert kept["nll_zero"] == pytest.approx(row["nll_zero"], rel=1e-2, abs=1e-3)
