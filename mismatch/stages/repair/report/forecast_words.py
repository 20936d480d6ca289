"""The forecast of a repair in words: before the first stage, and beside what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mismatch.stages.repair.forecast import MISS, NUMBERS, OWN

SURE = round(100 * (1 - MISS))
"""Of the interval, in percent."""


def forecast_lines(told: Mapping[str, Any]) -> list[str]:
    """What a person reads before the first stage.

    Args:
        told: the fields of `mismatch.stages.repair.forecast.Foretold`.
    """
    if told["why_not"] is not None:
        return [f"no forecast: {told['why_not']}"]
    lines = [
        f"forecast  {name}: gap closed {share(one)} ({SURE} %), from {used(one)}"
        for name, one in told["rungs"].items()
    ]
    lines.append(f"forecast  after {told['record']}")
    return lines + ([f"forecast  {told['note']}"] if told["note"] else [])


def share(one: Mapping[str, Any]) -> str:
    """`62 % [40, 85]`."""
    value, lo, hi = (round(100 * one[name]) for name in ("value", "lo", "hi"))
    return f"{value} % [{lo}, {hi}]"


def used(one: Mapping[str, Any]) -> str:
    """The numbers behind a forecast, in words."""
    words = {**NUMBERS, OWN: "the same mechanism in other layers"}
    return ", ".join(words[name] for name in one["used"]) or "the mean of the record"


def score(told: Mapping[str, Any] | None, rung: str) -> str:
    """`forecast 62 % [40, 85]: inside`; empty for a stage without a forecast, or that was not run."""
    one = (told or {}).get("rungs", {}).get(rung)
    if one is None or "inside" not in one:
        return ""
    return f"forecast {share(one)}: {'inside' if one['inside'] else 'outside'}"
