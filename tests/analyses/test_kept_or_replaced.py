"""The verdict of `analyses/kept_or_replaced.py` follows planted numbers."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pandas as pd
from scripts import script

from mismatch import spec


def kept(module: ModuleType, beside: float, random: float = 0.001) -> pd.DataFrame:
    """Replaced: 0.1 nats, mended to 0.05; added: `beside`, mended to 0.001 with alpha turned to 0.02."""
    rows = []
    for case in module.cases():
        adapter = case.mechanism in module.ADAPTERS
        before = 0.0 if adapter else 0.1 if case.column == "replaced" else beside
        after = before / 2 if adapter or case.column == "replaced" else 0.001
        if case.mechanism == "random" and case.column != "replaced":
            after = random
        alpha = 0.02 if "parallel(" in case.swap else np.nan
        rows.append((case.mechanism, case.column, case.slot, case.swap, before, after, alpha))
    columns = ["mechanism", "column", "slot", "swap", "before", "after", "alpha"]
    found = pd.DataFrame(rows, columns=columns).assign(gap_closed=0.5, zero=0.2, linear=0.08)
    for name in ("before", "after", "zero", "linear"):
        found[f"{name}_lo"], found[f"{name}_hi"] = 0.9 * found[name], 1.1 * found[name]
    return found


def test_every_cell_of_the_table_is_a_swap():
    module = script("kept_or_replaced")
    swaps = [case.swap for case in module.cases()]
    assert len(set(swaps)) == len(swaps)
    for swap in swaps:
        spec.check(spec.parse(swap))
    assert sum(bool(case.controls) for case in module.cases()) == len(module.CONTROLLED)


def test_kept_or_replaced_follows_what_was_planted():
    module = script("kept_or_replaced")
    said = module.verdict(kept(module, beside=0.01))
    assert (
        "before repair: added in full in 8 of 8 (holds), a tenth added in 8 of 8 (holds)" in said[0]
    )
    assert "from 1 to 0.02 .. 0.02, down by more than half in 8 of 8" in said[2]
    assert "not measurably worse than the mechanism in 7 of 7 (added in full), 7 of 7" in said[2]
    assert "Mamba-2 0.0500 [0.0450, 0.0550] (better than)" in said[3]
    assert "start at 0 in 6 of 6; not: none" in said[4]
    said = module.verdict(kept(module, beside=0.3, random=0.1))
    assert "before repair: added in full in 0 of 8 (does not hold)" in said[0]
    assert "not measurably worse than the mechanism in 0 of 7" in said[2]
    assert (
        "after repair: added in full in 7 of 8 (depends on the mechanism: not random weights)"
        in said[1]
    )
