"""The verdict of `analyses/update_size.py` follows planted numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scripts import script


def sizes(damage_of) -> pd.DataFrame:
    """Thirty layers, two cases; `damage_of(case, size, noise)` plants the answer."""
    rng = np.random.default_rng(0)
    rows = []
    for case in ("a", "b"):
        for layer in range(30):
            size, noise = rng.uniform(0.1, 1), rng.uniform(0.1, 1)
            rows.append(
                {
                    "case": case, "layer": layer, "size": size, "turn": noise,
                    "fisher": damage_of(case, size, noise), "damage": damage_of(case, size, noise),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("damage_of", "word"),
    [
        (lambda case, size, noise: size**2, "holds"),
        (lambda case, size, noise: -size, "does not hold"),
        (lambda case, size, noise: size if case == "a" else -size, "depends on the part"),
    ],
)
def test_update_size_follows_what_was_planted(damage_of, word):
    module = script("update_size")
    said = module.verdict(module.correlations(sizes(damage_of)))
    assert said.startswith(f"Update size predicts damage over layers: {word}.")


def test_update_size_names_what_does_better():
    module = script("update_size")
    said = module.verdict(module.correlations(sizes(lambda case, size, noise: size + 5 * noise)))
    assert "turn for a" in said
    assert "fisher for b (1.00)" in said
    assert "layer" not in said.partition("Better")[2]
