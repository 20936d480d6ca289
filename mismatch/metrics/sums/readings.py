"""What a metric says, and how sure it is: `Reading` and the bootstrap over documents.

The unit of resampling is the document, because the tokens of one document are not independent.
A mean over tokens is a ratio of two sums over documents (of values, of counts), so a resample is
one row of multinomial weights and all resamples are one matrix product. Percentile interval
(Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3).
With few documents it is too narrow: simulated with normal and log-normal documents, a nominal
95 % covers 88 % with 8 documents, 90-92 % with 16, 93-94 % with 40.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Reading:
    """One number of one metric at one site.

    `lo`, `hi`: 95 % interval over documents, nan where there is none. `n`: tokens behind it.
    `position`: "all" or an inclusive range of token positions such as "64-127".
    """

    stat: str
    value: float
    lo: float = math.nan
    hi: float = math.nan
    n: int = 0
    position: str = "all"


@lru_cache(maxsize=16)
def resamples(n: int, seed: int = 0) -> np.ndarray:
    """Float64 `RESAMPLES n`: how often each of `n` documents is drawn in each resample."""
    rng = np.random.Generator(np.random.PCG64(seed))
    weights = rng.multinomial(n, np.full(n, 1.0 / n), size=RESAMPLES).astype(np.float64)
    weights.setflags(write=False)
    return weights


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The percentile interval of `draws`; nan where fewer than half of them are finite numbers."""
    finite = draws[np.isfinite(draws)]
    if len(finite) * 2 < len(draws):
        return math.nan, math.nan
    lo, hi = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(lo), float(hi)


def mean_of(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> tuple[float, float, float, int]:
    """Token-weighted mean over documents and its interval.

    Args:
        sums: per-document sum of a value, [docs].
        counts: per-document number of tokens, [docs]; documents without tokens take no part.
        seed: of the resampling.

    Returns:
        value, lo, hi, n: nan without tokens; lo and hi nan with fewer than two documents.
    """
    used = counts > 0
    sums, counts = sums[used], counts[used]
    n = int(counts.sum())
    if n == 0:
        return math.nan, math.nan, math.nan, 0
    value = float(sums.sum() / n)
    if len(sums) < 2:
        return value, math.nan, math.nan, n
    weights = resamples(len(sums), seed)
    return value, *interval((weights @ sums) / (weights @ counts)), n
