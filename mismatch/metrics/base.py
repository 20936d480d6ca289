"""The base of a metric: `Metric` and its three kinds. The accumulators are re-exported from here.

A metric declares its facts as literal class attributes (they are read without importing the file)
and names what to sum (`state`): numbers per token, moments, or groups of tokens. All sums are kept
in float64 and merge in any order.

    unit         of the headline stat
    range        of the headline stat
    better       "lower", "higher" or "none": which direction means closer to the teacher
    null         stat -> what it reads, exactly, when teacher and student are bit-equal
    headline     the stat that is 0 there; the one to draw
    invariant    changes of the student that the headline does not see (vectors as rows):
                 "rotation" an orthogonal map, "permutation" of channels, "scale" by a positive
                 number, "shift" by a constant vector; "joint rotation" of both sides alike
    blind        in words: what it cannot see
    source       paper and equation
    at           which sites feed it: "stream", "update" (attn_out and mlp_out), "logits", "lens"
    mask         tokens it uses: "valid" (all real ones), "bulk" (without position 0 and massive
                 tokens), "sample" (a part of bulk), "has_target"
    state        "tokens", "moments" or "minibatch"
    default      False: measured only when it is named
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from mismatch.metrics.sums.logits import LogitPair
from mismatch.metrics.sums.minibatch import GROUP, Groups, PairGroups, TeacherGroups
from mismatch.metrics.sums.moments import Moments, PairMoments, TeacherMoments, TeacherView
from mismatch.metrics.sums.pairs import Pair, TeacherSide, massive_tokens
from mismatch.metrics.sums.per_document import PerDocument
from mismatch.metrics.sums.readings import Reading
from mismatch.metrics.sums.tokens import Kept, TokenSums
from mismatch.runs.intervals import DOCUMENTS

__all__ = [
    "GROUP",
    "Groups",
    "Kept",
    "LogitPair",
    "Metric",
    "Moments",
    "Pair",
    "PairGroups",
    "PairMoments",
    "PerDocument",
    "Reading",
    "TeacherGroups",
    "TeacherMoments",
    "TeacherSide",
    "TeacherView",
    "TokenMetric",
    "TokenSums",
    "massive_tokens",
]

QUANTILES = {"p5": 0.05, "p50": 0.50, "p95": 0.95}


class Metric:
    """Base of all metrics; see the module's docstring for the facts."""

    unit: ClassVar[str]
    range: ClassVar[str]
    better: ClassVar[str]
    null: ClassVar[dict[str, float]]
    headline: ClassVar[str]
    invariant: ClassVar[tuple[str, ...]]
    blind: ClassVar[str]
    source: ClassVar[str]
    at: ClassVar[str]
    mask: ClassVar[str]
    state: ClassVar[str]

    def read(self, state: Any) -> list[Reading]:
        """The numbers of this metric from its state: `TokenSums`, `Moments` or `Groups`."""
        raise NotImplementedError


class TokenMetric(Metric):
    """A metric that is a number per token.

    `stats`: stat -> (column, how), with how one of mean, max, p5, p50, p95. Means get an interval, and at the logits
    one row per position bin as well; quantiles and maxima none. A range that begins at 0 says that no number is below.
    """

    state = "tokens"
    stats: ClassVar[dict[str, tuple[str, str]]]

    def values(self, pair: Any) -> dict[str, Tensor]:
        """Column -> number per token (`batch pos`, or `tokens` for a `LogitPair`)."""
        raise NotImplementedError

    def sums(self, n_docs: int, n_pos: int, units: str = DOCUMENTS) -> TokenSums:
        """An empty accumulator for this metric."""
        columns = tuple(dict.fromkeys(column for column, _ in self.stats.values()))
        histogram = tuple(
            dict.fromkeys(column for column, how in self.stats.values() if how in QUANTILES)
        )
        return TokenSums(
            n_docs,
            n_pos,
            columns,
            by_position=self.at == "logits",
            histogram=histogram,
            units=units,
            positive=self.range.startswith("[0"),
        )

    def update(self, sums: TokenSums, pair: Pair | LogitPair) -> None:
        """Adds the tokens of `pair` that this metric uses."""
        sums.update(self.values(pair), pair.kept(self.mask))

    def read(self, state: TokenSums) -> list[Reading]:
        out = []
        for stat, (column, how) in self.stats.items():
            if how == "mean":
                out += [state.mean(column, stat), *state.by_position(column, stat)]
            elif how == "max":
                out.append(state.largest(column, stat))
            else:
                out.append(state.quantile(column, QUANTILES[how], stat))
        return out


def three(teacher: float, student: float, n: int, equal: bool) -> list[Reading]:
    """Readings teacher, student and shift = log2(student / teacher), exactly 0 when `equal`."""
    defined = teacher > 0 and student > 0
    shift = 0.0 if equal else math.log2(student / teacher) if defined else math.nan
    return [
        Reading("shift", shift, n=n),
        Reading("teacher", teacher, n=n),
        Reading("student", student, n=n),
    ]
