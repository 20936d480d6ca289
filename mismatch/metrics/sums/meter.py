"""All metrics of one site, fed together: `TeacherMeter` (one per site), `StudentMeter` (per student).

    teacher = TeacherMeter(names, d)
    student = StudentMeter(names, d, n_docs, n_pos)
    per batch:  teacher.update(pair); student.update(pair)      pair = first.with_student(other)
    at the end: student.read(teacher) -> [(metric name, Reading), ...]

Metrics that share a state share it here too: seven metrics read one `PairMoments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from mismatch.errors import RunError
from mismatch.metrics import load_metric
from mismatch.metrics.base import (
    GROUP,
    Groups,
    LogitPair,
    Metric,
    Moments,
    Pair,
    PairGroups,
    PairMoments,
    Reading,
    TeacherGroups,
    TeacherMoments,
    TeacherView,
    TokenMetric,
)
from mismatch.runs.intervals import DOCUMENTS


class _Meter:
    """A named set of accumulators that merge, save and load together."""

    def __init__(self, names: Sequence[str]) -> None:
        self.metrics: dict[str, Metric] = {name: load_metric(name)() for name in names}
        self.parts: dict[str, Any] = {}

    def needs(self, state: str) -> bool:
        return any(metric.state == state for metric in self.metrics.values())

    def merge(self, other: _Meter) -> Self:
        if self.parts.keys() != other.parts.keys():
            raise RunError(
                f"parts of two runs do not fit: {sorted(self.parts)} and {sorted(other.parts)}",
                hint="merge only parts of one run, with the same metrics.",
            )
        for name, part in self.parts.items():
            part.merge(other.parts[name])
        return self

    def state(self) -> dict[str, np.ndarray]:
        return {
            f"{name}/{key}": array
            for name, part in self.parts.items()
            for key, array in part.state().items()
        }

    def load(self, state: dict[str, np.ndarray]) -> Self:
        for name, part in self.parts.items():
            head = f"{name}/"
            mine = {key[len(head) :]: state[key] for key in state if key.startswith(head)}
            if not mine:
                raise RunError(
                    f"the saved state holds nothing for '{name}'",
                    hint="resume with the metrics that the run began with.",
                )
            part.load(mine)
        return self


class TeacherMeter(_Meter):
    """What depends on the teacher only, at one site with `d` channels."""

    def __init__(self, names: Sequence[str], d: int, *, group: int = GROUP) -> None:
        super().__init__(names)
        if self.needs("moments"):
            self.parts["moments"] = TeacherMoments(d)
        if self.needs("minibatch"):
            self.parts["minibatch"] = TeacherGroups(group)

    def update(self, pair: Pair) -> None:
        """Adds one batch; once per batch, with the pair of any one student."""
        for part in self.parts.values():
            part.update(pair.side)

    def view(self) -> TeacherView | None:
        """The teacher's decompositions, to share between the `read`s of several students."""
        return TeacherView(self.parts["moments"]) if "moments" in self.parts else None


class StudentMeter(_Meter):
    """One student at one site. For logits and lens, which have no channels, leave `d` out.

    `n_docs`, `units`: how many units sums are kept by, and what they are: `Units`.
    """

    def __init__(
        self,
        names: Sequence[str],
        d: int = 0,
        *,
        n_docs: int,
        n_pos: int,
        units: str = DOCUMENTS,
        group: int = GROUP,
    ) -> None:
        super().__init__(names)
        for name, metric in self.metrics.items():
            if isinstance(metric, TokenMetric):
                self.parts[name] = metric.sums(n_docs, n_pos, units)
        if self.needs("moments"):
            self.parts["moments"] = PairMoments(d)
        if self.needs("minibatch"):
            self.parts["minibatch"] = PairGroups(group, units)

    def update(self, pair: Pair | LogitPair) -> None:
        """Adds one batch (or one chunk of logits)."""
        if isinstance(pair, LogitPair):
            pair.joint = {"kl", "js"} <= self.metrics.keys()
        for name, metric in self.metrics.items():
            if isinstance(metric, TokenMetric):
                metric.update(self.parts[name], pair)
        for name in ("moments", "minibatch"):
            if name in self.parts:
                self.parts[name].update(pair)

    def read(
        self, teacher: TeacherMeter | Any = None, view: TeacherView | None = None
    ) -> list[tuple[str, Reading]]:
        """All numbers, as (metric name, reading). `view`: `teacher.view()`, if shared."""
        states: dict[str, Any] = {}
        if "moments" in self.parts:
            view = view or teacher.parts["moments"]
            states["moments"] = Moments(view, self.parts["moments"])
        if "minibatch" in self.parts:
            states["minibatch"] = Groups(teacher.parts["minibatch"], self.parts["minibatch"])
        out = []
        for name, metric in self.metrics.items():
            state = self.parts[name] if name in self.parts else states[metric.state]
            out += [(name, reading) for reading in metric.read(state)]
        return out
