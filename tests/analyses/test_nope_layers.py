"""The verdict of `analyses/nope_layers.py` follows planted numbers."""

from __future__ import annotations

import pandas as pd
from scripts import script


def nope(worst: int, change: float, few: float, rest: float) -> tuple:
    """One layer costs 5 nats, the others 0.1; RoPE missing in few layers or in the rest costs so much."""
    rows = [
        (task, layer, 5.0 if layer == worst else 0.1)
        for task in ("text", "induction", "passkey")
        for layer in range(30)
    ]
    where = pd.DataFrame(rows, columns=["task", "layer", "value"])
    where = where.assign(lo=0.9 * where["value"], hi=1.1 * where["value"])
    where["best_previous"] = where["value"]
    local = pd.DataFrame(
        [
            ("swap", "change[keep=1]", "attn_out", change),
            ("swap", "r2", "resid_post", 0.6),
            ("teacher", "r2", "resid_post", 0.7),
        ],
        columns=["student", "stat", "site", "value"],
    )
    together = pd.DataFrame(
        [("the k", 1, "induction", few), ("all others", 1, "induction", rest)],
        columns=["removed", "k", "task", "value"],
    )
    return where, local, together.assign(lo=0.9 * together["value"], hi=1.1 * together["value"])


def test_nope_names_the_layer_and_the_carrier():
    module = script("nope_layers")
    where, local, together = nope(worst=16, change=3e-7, few=6.0, rest=1.0)
    said = module.verdict(where, local, together, module.ranked_by_head(where))
    assert "induction loses most in one layer: 16" in said
    assert "the layer itself knows no order any more" in said
    assert "R2 0.60 to 0.60 (with RoPE 0.70 to 0.70)" in said
    assert "RoPE in the 1 layers that copying needs most is worth more" in said
    where, local, together = nope(worst=16, change=0.3, few=1.0, rest=6.0)
    said = module.verdict(where, local, together, module.ranked_by_head(where))
    assert "still knows order" in said
    assert "no few layers carry it" in said
