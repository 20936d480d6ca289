"""The verdict of `analyses/planted_faults.py` follows planted numbers."""

from __future__ import annotations

import pandas as pd
from scripts import script


def test_planted_faults_are_right_only_if_the_planted_one_leads():
    module = script("planted_faults")
    rows = [
        {
            "fault": kind, "panel": "part", "name": wanted if kind != "delayed" else "linear",
            "leading": kind != "first", "share": 0.9, "lo": 0.8, "hi": 1.0, "damage": 0.1,
        }
        for kind, (_, wanted) in module.FAULTS.items()
    ]  # fmt: skip
    found = module.named(pd.DataFrame(rows))
    wrong = {kind for kind, said in found.items() if not said["right"]}
    assert wrong == {"delayed", "first"}
    assert found["first"]["leading"] is None
    assert found["scaled"]["share"] == 0.9
    assert module.draw(pd.DataFrame(rows)).axes
