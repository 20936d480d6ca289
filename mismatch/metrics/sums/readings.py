"""`Reading`: one number of one metric at one site."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mismatch.metrics.sums.per_document import Estimate


@dataclass(frozen=True)
class Reading:
    """One number of one metric at one site.

    `lo`, `hi`: 95 % interval (`mismatch.metrics.sums.per_document`), nan where there is none. `n`: tokens behind it.
    `position`: "all" or an inclusive range of token positions such as "64-127". `over`: what the interval is over.
    """

    stat: str
    value: float
    lo: float = math.nan
    hi: float = math.nan
    n: int = 0
    position: str = "all"
    over: str = ""

    @classmethod
    def of(cls, stat: str, found: Estimate, position: str = "all") -> Reading:
        """An estimate under the name of a statistic."""
        return cls(stat, found.value, found.lo, found.hi, found.n, position, found.over)

    def as_row(self) -> dict[str, Any]:
        """Its columns of the long table, without the address."""
        return {
            "position": self.position,
            "stat": self.stat,
            "value": self.value,
            "lo": self.lo,
            "hi": self.hi,
            "n": self.n,
            "over": self.over,
        }
