"""The forecast of a repair in words: before the first stage, and beside what came of it."""

from __future__ import annotations

from mismatch.stages.repair.forecast import MISS, NUMBERS, OWN, Forecast, Foretold

SURE = round(100 * (1 - MISS))
"""Of the interval, in percent."""


def forecast_lines(told: Foretold) -> list[str]:
    """What a person reads before the first stage.

    Args:
        told: what is forecast.
    """
    if told.why_not is not None:
        return [f"no forecast: {told.why_not}"]
    lines = [
        f"forecast  {name}: gap closed {share(one)} ({SURE} %), from {used(one)}"
        for name, one in told.stages.items()
    ]
    lines.append(f"forecast  after {told.record}")
    return lines + ([f"forecast  {told.note}"] if told.note else [])


def share(one: Forecast) -> str:
    """`62 % [40, 85]`."""
    value, lo, hi = (round(100 * x) for x in (one.value, one.lo, one.hi))
    return f"{value} % [{lo}, {hi}]"


def used(one: Forecast) -> str:
    """The numbers behind a forecast, in words."""
    words = {**NUMBERS, OWN: "the same mechanism in other layers"}
    return ", ".join(words[name] for name in one.used) or "the mean of the record"


def score(told: Foretold, stage: str) -> str:
    """`forecast 62 % [40, 85]: inside`; empty for a stage without a forecast, or that was not run."""
    one = told.stages.get(stage)
    if one is None or one.measured is None:
        return ""
    return f"forecast {share(one)}: {inside(one)}"


def inside(one: Forecast) -> str:
    """Whether what was measured lies in the interval."""
    return "inside" if one.measured is not None and one.has(one.measured) else "outside"
