"""How an interval is named, printed and judged, and how it is said that there is none: the one place for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pandas as pd

from mismatch.report.style import interval, number
from mismatch.runs.intervals import BLOCKS, DOCUMENTS_NEEDED, WINDOWS_NEEDED

NONE = "no interval"
WHY_NONE = f"{NONE}: that takes {DOCUMENTS_NEEDED} documents, or {WINDOWS_NEEDED} windows of fewer"


def named(over: Iterable[str]) -> str:
    """`95 % interval over documents`, for a caption or a heading; why there is none, where there is none.

    Args:
        over: what intervals are over, as the table says it; "" does not count.
    """
    found = [
        f"{name} of fewer than {DOCUMENTS_NEEDED} documents" if name == BLOCKS else name
        for name in dict.fromkeys(over)
        if name
    ]
    return f"95 % interval over {' and '.join(found)}" if found else WHY_NONE


def band(lo: float, hi: float, form: Callable[[float], str] = number) -> str:
    """`[0.0551, 0.0670]`, or that there is none."""
    return NONE if pd.isna(lo) or pd.isna(hi) else f"[{form(lo)}, {form(hi)}]"


def said(value: float, lo: float, hi: float) -> str:
    """`0.0612 [0.0551, 0.0670]` or `0.0612 (no interval)`, for a sentence."""
    return interval(value, lo, hi) + (f" ({NONE})" if pd.isna(lo) or pd.isna(hi) else "")


def side(lo: float, hi: float, border: float = 0.0) -> str:
    """On which side of a border a number lies, as far as its interval tells.

    Returns:
        `above`, `below`, `open` (the interval holds the border) or `none` (there is no interval).
    """
    if pd.isna(lo) or pd.isna(hi):
        return "none"
    return "above" if lo > border else "below" if hi < border else "open"
