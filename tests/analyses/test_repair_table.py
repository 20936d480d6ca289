"""The verdict of `analyses/repair_table.py` follows planted numbers."""

from __future__ import annotations

import pytest
from scripts import script


def row_of(**students: tuple[float, float, float]) -> dict:
    """A row of the table; each student as value, lower and upper end."""
    row = {"gap_closed": 0.8, "gap_lo": 0.7, "gap_hi": 0.9}
    usual = {
        "swap": (0.08, 0.06, 0.10), "repaired": (0.02, 0.015, 0.025),
        "zero": (0.10, 0.09, 0.11), "linear": (0.06, 0.05, 0.07),
    }  # fmt: skip
    for name, values in (usual | students).items():
        row |= dict(zip((name, f"{name}_lo", f"{name}_hi"), values, strict=True))
    return row


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (row_of(), "repairs"),
        (row_of(swap=(0.001, 0.0009, 0.0011)), "little to repair: 1 % of what deleting costs"),
        (row_of(repaired=(0.055, 0.05, 0.06)), "repairs; no better than a linear map"),
        (row_of(repaired=(0.09, 0.08, 0.10)), "repairs; worse than a linear map"),
        (row_of(swap=(0.2, 0.18, 0.22)), "repairs; began worse than no layer"),
        (row_of() | {"gap_lo": 0.4}, "repairs in part"),
        (row_of() | {"gap_closed": 0.1, "gap_lo": 0.0, "gap_hi": 0.2}, "does not repair"),
    ],
)
def test_repair_table_says_what_the_numbers_say(row, said):
    assert script("repair_table").verdict(row, False) == said
    # Where there was little to repair no branch has to be used.
    through = said if "little" in said else f"{said}; by bypass"
    assert script("repair_table").verdict(row, True) == through
