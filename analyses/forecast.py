"""How much of the gap each stage will close, before anything is trained, from a record of repairs that were scored.

The record (`forecast.csv`, of analyses/forecast_score.py) holds a row per swap: numbers known before training, and the
share of the gap that was closed after each stage. A forecast is the mean of the record (of the same mechanism, where it
is known), or a line in one or two of the numbers, whichever errs least on cells that it was not fitted on: a number
that helps no more than the mean is not used.

The interval is CV+ (Barber, Candes, Ramdas, Tibshirani 2021, Predictive inference with the jackknife+, section 3): for
each fold k a line chosen and fitted without it, its errors R_i on the cells of that fold, and quantiles of line_k(x) -
R_i and of line_k(x) + R_i over all cells. A fold is one layer where the record knows the mechanism, and one mechanism
where it does not: the forecast for a mechanism that nobody tried is tested on mechanisms that were left out. Coverage
is promised for a swap that is drawn like those of the record (at least 1 - 2 `MISS`, usually about 1 - `MISS`). Nothing
is promised for another, so what lies outside of the record is refused in words. No torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from mismatch.stages.repair.ladder_stages.stage_result import StageResult

NUMBERS = {
    "removed": "the share of its error that a linear map of its own output removes",
    "mapped_error": "the error that this map leaves",
    "local_error": "the error of the module on the teacher's input",
    "of_zero": "its KL over that of deleting the module",
}
"""What a repair knows before it trains, at little cost. Errors as in `mismatch.stages.repair.ladder_stages.loss`."""
SHARES = ("removed",)
"""Numbers that a line takes as they are; of the others, which are above 0, it takes the logarithm."""
OWN = "mechanism"
"""Stands among the numbers used where a forecast begins at the mean of the same mechanism in other layers."""
MISS = 0.1
"""Share of the measured gaps that may fall outside of the interval."""
USED = 2
"""Numbers in one forecast, at most: the record has tens of rows, not hundreds."""
BUDGET = 2.0
"""Factor between tokens seen here and in the record, beyond which the forecast says so."""
BEYOND = 0.1
"""Share of the record's range by which a number may leave it."""


@dataclass(frozen=True)
class Forecast:
    """The share of the gap expected to be closed after a stage, 1 = all of it.

    Attributes:
        value, lo, hi: expected, and the interval.
        used: names of `NUMBERS`, `OWN`; none where the mean of the record errs less.
        cells: rows of the record behind it.
    """

    value: float
    lo: float
    hi: float
    used: tuple[str, ...] = ()
    cells: int = 0
    measured: float | None = None
    """The share that the repair closed; None: not run, or not yet."""

    def has(self, measured: float) -> bool:
        """Whether a measured share lies in the interval."""
        return self.lo <= measured <= self.hi


@dataclass(frozen=True)
class Swap:
    """What is to be forecast.

    Attributes:
        mechanism: in canonical form with its arguments, as in the swap; with others it is another mechanism.
        slot: of the module.
        modules: how many were swapped.
        n_layers, d_model: of the model.
        numbers: by name, of `NUMBERS`; those that were not measured are absent.
    """

    mechanism: str
    slot: str
    modules: int
    n_layers: int
    d_model: int
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Foretold:
    """The forecasts of one repair.

    Attributes:
        stages: of the ladder by name, those that the record holds.
        numbers: what they were made from.
        record: where they come from, in words.
        why_not: why there is none; None where there is.
        note: what should be known when it is read; empty for nothing.
    """

    stages: dict[str, Forecast]
    numbers: dict[str, float]
    record: str
    why_not: str | None = None
    note: str = ""

    def scored(self, ran: Sequence[StageResult]) -> Foretold:
        """The same with what was measured beside each forecast.

        Args:
            ran: the stages of the ladder. One that was undone closed what was closed before it; one that was left out
                is not scored.
        """
        stages, closed = dict(self.stages), 0.0
        for one in ran:
            closed = one.gap_closed if one.kept else closed
            if one.name in stages and one.tokens:
                stages[one.name] = replace(stages[one.name], measured=closed)
        return replace(self, stages=stages)


@functools.cache
def shipped() -> pd.DataFrame:
    """The record that comes with mismatch.

    Returns:
        A row per repair: model, n_layers, d_model, slot, tokens, epochs, seq_len, layer, mechanism, the numbers of
        `NUMBERS`, and `closed R` for each stage R, NaN where it was not run.
    """
    with (resources.files(__package__) / "forecast.csv").open() as file:
        return pd.read_csv(file)


def foretell(swap: Swap, stages: Sequence[str], seen: int | None) -> Foretold:
    """The forecast of each stage, from the record that is shipped.

    Args:
        swap: what is repaired.
        stages: that are asked for.
        seen: tokens that a stage learns from, each as often as it is seen; None where no repair is planned yet.
    """
    record = shipped()
    first, cells = record.iloc[0], len(record)
    said = (
        f"{cells} repairs of {first['model']}, {first['tokens']:,} tokens in windows of {first['seq_len']} seen "
        f"{first['epochs']} times by each stage"
    )
    numbers = dict(swap.numbers)
    why = outside(swap, record)
    if why is not None:
        return Foretold({}, numbers, said, why)
    found = {stage: forecast(swap, stage, record) for stage in stages}
    note = ""
    ratio = 1.0 if seen is None else seen / float(first["tokens"] * first["epochs"])
    if not 1 / BUDGET <= ratio <= BUDGET:
        note = (
            f"this repair may see {ratio:.2g} times as many tokens as those of the record: expect "
            f"{'more' if ratio > 1 else 'less'} than is forecast for stages that train"
        )
    return Foretold({r: f for r, f in found.items() if f is not None}, numbers, said, None, note)


def outside(swap: Swap, record: pd.DataFrame) -> str | None:
    """Why the record says nothing of this swap, in words; None: it does."""
    known = record.iloc[0]
    if (swap.n_layers, swap.d_model) != (known["n_layers"], known["d_model"]):
        return (
            f"the record is of {known['model']} ({known['n_layers']} layers of width {known['d_model']}), this model "
            f"has {swap.n_layers} of {swap.d_model}"
        )
    if swap.modules > 1:
        return f"the record holds one swapped module at a time, here are {swap.modules}"
    slots = sorted(set(record["slot"]))
    if swap.slot not in slots:
        return f"the record holds swaps of {', '.join(slots)}, not of {swap.slot}"
    for name, value in swap.numbers.items():
        low, high = record[name].min(), record[name].max()
        with np.errstate(divide="ignore", invalid="ignore"):  # of a swap that does nothing
            least, most, at = _scaled(name, np.array([low, high, value]))
            inside = -BEYOND <= (at - least) / (most - least) <= 1 + BEYOND
        if not inside:
            return f"{NUMBERS[name]} is {value:.3g}, in the record {low:.3g} to {high:.3g}"
    return None


def forecast(swap: Swap, stage: str, record: pd.DataFrame) -> Forecast | None:
    """The forecast of one stage; None where the record holds no run of it.

    Args:
        swap: not `outside` of the record.
        stage: of the ladder.
        record: as `shipped`.
    """
    column = f"closed {stage}"
    rows = record[record[column].notna()] if column in record else record.iloc[:0]
    by = "layer" if swap.mechanism in set(rows["mechanism"]) else "mechanism"
    if rows[by].nunique() < 2:  # nothing to leave out
        return None
    y, folds = rows[column].to_numpy(float), rows[by].to_numpy()
    known = [name for name in NUMBERS if name in swap.numbers and name in rows]
    starts = ((), (OWN,)) if by == "layer" else ((),)
    names = [(*s, *c) for n in range(USED + 1) for s in starts for c in combinations(known, n)]
    cells = pd.concat([rows, pd.DataFrame([{OWN: swap.mechanism, **swap.numbers}])])
    designs = {chosen: _design(cells, chosen) for chosen in names}  # the last row is the swap
    every = np.ones(len(y), bool)
    errors, there = np.empty(len(y)), np.empty(len(y))
    for fold in np.unique(folds):
        held = folds == fold
        x = designs[_choice(designs, y, folds, ~held)]
        read = _line(x[:-1][~held], y[~held], x)
        errors[held], there[held] = np.abs(y[held] - read[:-1][held]), read[-1]
    used = _choice(designs, y, folds, every)
    value = _line(designs[used][:-1], y, designs[used][-1:])[0]
    return Forecast(float(value), *_interval(there, errors), used, len(rows))


def _design(cells: pd.DataFrame, names: tuple[str, ...]) -> np.ndarray:
    """`cells columns`: a one, or one for each mechanism; and numbers."""
    of = cells[OWN].to_numpy()[:, None]
    start = of == np.unique(of) if OWN in names else np.ones_like(of)
    numbers = [_scaled(name, cells[name].to_numpy(float)) for name in names if name != OWN]
    return np.column_stack([start, *numbers]).astype(float)


def _scaled(name: str, values: Any) -> Any:
    return values if name in SHARES else np.log(values)


def _choice(
    designs: Mapping[tuple[str, ...], np.ndarray],
    y: np.ndarray,
    folds: np.ndarray,
    mask: np.ndarray,
) -> tuple[str, ...]:
    """The numbers whose line errs least on folds that it was not fitted on, among the cells of `mask`.

    Errors are compared in whole points, the mean first: of choices that err alike the simplest is taken.
    """
    y, folds = y[mask], folds[mask]
    kept = np.unique(folds)

    def error(names: tuple[str, ...]) -> float:
        x = designs[names][:-1][mask]
        off = [
            np.abs(y[held] - _line(x[~held], y[~held], x[held]))
            for held in (folds == fold for fold in kept)
        ]
        return round(float(np.concatenate(off).mean()), 2)

    return min(designs, key=error) if len(kept) > 1 else ()


def _line(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Least squares of y on x, read at other x; a share that is closed lies in 0..1."""
    return np.clip(at @ np.linalg.lstsq(x, y, rcond=None)[0], 0.0, 1.0)


def _interval(there: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    """The quantiles of Barber et al., equation 6; cut to 0..1, which no measured share leaves."""
    n = len(errors)
    low, high = np.sort(there - errors), np.sort(there + errors)
    below, above = math.floor(MISS * (n + 1)), math.ceil((1 - MISS) * (n + 1))
    lo = low[below - 1] if below >= 1 else -math.inf
    hi = high[above - 1] if above <= n else math.inf
    return float(np.clip(lo, 0.0, 1.0)), float(np.clip(hi, 0.0, 1.0))
