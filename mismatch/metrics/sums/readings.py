"""`Reading`: one number of one metric at one site."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """One number of one metric at one site.

    `lo`, `hi`: 95 % interval over documents (`mismatch.metrics.sums.per_document`), nan where there is none. `n`:
    tokens behind it. `position`: "all" or an inclusive range of token positions such as "64-127".
    """

    stat: str
    value: float
    lo: float = math.nan
    hi: float = math.nan
    n: int = 0
    position: str = "all"
