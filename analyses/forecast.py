"""How much of the gap each stage of a repair will close, before anything is trained, from a record of repairs.

A forecast is the mean of the record (of the same mechanism, where it is known), or a line in one or two numbers that
are known before training, whichever errs least on cells that it was not fitted on: a number that helps no more than the
mean is not used.

The interval is CV+ (Barber, Candes, Ramdas, Tibshirani 2021, Predictive inference with the jackknife+, section 3): for
each fold k a line chosen and fitted without it, its errors R_i on the cells of that fold, and quantiles of line_k(x) -
R_i and of line_k(x) + R_i over all cells. A fold is one layer where the record knows the mechanism, and one mechanism
where it does not. Coverage is promised for a swap that is drawn like those of the record (at least 1 - 2 `MISS`,
usually about 1 - `MISS`), and for no other. `forecast_score.py` says what came of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

NUMBERS = {
    "removed": "the share of its error that a linear map of its own output removes",
    "mapped_error": "the error that this map leaves",
    "local_error": "the error of the module on the teacher's input",
    "of_zero": "its KL over that of deleting the module",
}
"""Known before training, at little cost. Errors as in `mismatch.stages.repair.ladder_stages.loss`."""
SHARES = ("removed",)
"""Numbers that a line takes as they are; of the others, which are above 0, it takes the logarithm."""
OWN = "mechanism"
"""Stands among the numbers used where a forecast begins at the mean of the same mechanism in other layers."""
MISS = 0.1
"""Share of the measured gaps that may fall outside of the interval."""
USED = 2
"""Numbers in one forecast, at most: the record has tens of rows, not hundreds."""


@dataclass(frozen=True)
class Forecast:
    """The share of the gap expected to be closed after a stage, 1 = all of it.

    Attributes:
        value, lo, hi: expected, and the interval.
        used: names of `NUMBERS`, `OWN`; none where the mean of the record errs less.
    """

    value: float
    lo: float
    hi: float
    used: tuple[str, ...] = ()

    def has(self, measured: float) -> bool:
        """Whether a measured share lies in the interval."""
        return self.lo <= measured <= self.hi


def forecast(
    mechanism: str, numbers: Mapping[str, float], stage: str, record: pd.DataFrame
) -> Forecast | None:
    """The forecast of one stage; None where the record holds no run of it.

    Args:
        mechanism: in canonical form with its arguments, as in the swap; with others it is another mechanism.
        numbers: by name, of `NUMBERS`; those that were not measured are absent.
        stage: of the ladder.
        record: a row per repair: layer, mechanism, `NUMBERS`, and `closed STAGE`, NaN where it was not run.
    """
    column = f"closed {stage}"
    rows = record[record[column].notna()] if column in record else record.iloc[:0]
    by = "layer" if mechanism in set(rows["mechanism"]) else "mechanism"
    if rows[by].nunique() < 2:  # nothing to leave out
        return None
    y, folds = rows[column].to_numpy(float), rows[by].to_numpy()
    known = [name for name in NUMBERS if name in numbers and name in rows]
    starts = ((), (OWN,)) if by == "layer" else ((),)
    names = [(*s, *c) for n in range(USED + 1) for s in starts for c in combinations(known, n)]
    cells = pd.concat([rows, pd.DataFrame([{OWN: mechanism, **numbers}])])
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
    return Forecast(float(value), *_interval(there, errors), used)


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
