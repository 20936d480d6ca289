"""Turn meetings of teacher and student into sums, and sums into rows of the table.

One `StudentMeter` per (student, mode, layer, site), one `TeacherMeter` per (layer, site), shared by the students.
Nothing else outlives a batch (`mismatch.batch`), so memory does not grow with the text. Collectors merge in any
order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from mismatch.address import MAIN, NO_LAYER, TEACHER, Address
from mismatch.batch import Batch
from mismatch.layout import Layout
from mismatch.metrics import load_metric
from mismatch.metrics.base import Reading, paired_difference
from mismatch.metrics.meter import StudentMeter, TeacherMeter
from mismatch.tracing.sites import BLOCK_SITES
from mismatch.tracing.stream import Meeting


@dataclass
class Collector:
    """The sums of one run.

    Args:
        teacher: layout of the untouched model.
        students: layout of each student by name (swap, controls).
        metrics: names.
        n_docs, n_pos: documents of the run, tokens per window.
        sample: share of the tokens that feed the metrics of second moments.
        seed: of the sample, of the lens tokens and of the bootstrap.
    """

    teacher: Layout
    students: Mapping[str, Layout]
    metrics: Sequence[str]
    n_docs: int
    n_pos: int
    sample: float = 1.0
    seed: int = 0
    meters: dict[Address, StudentMeter] = field(default_factory=dict, repr=False)
    teachers: dict[Address, TeacherMeter] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._at: dict[str, tuple[str, ...]] = {}
        for name in self.metrics:
            at = load_metric(name).at
            self._at[at] = (*self._at.get(at, ()), name)

    def fresh(self) -> Collector:
        """An empty one with the same settings."""
        return Collector(
            self.teacher,
            self.students,
            self.metrics,
            self.n_docs,
            self.n_pos,
            self.sample,
            self.seed,
        )

    @contextmanager
    def batch(
        self,
        ids: Tensor,
        docs: Tensor,
        numbers: Sequence[int],
        *,
        only: str | None = None,
        teacher: Layout | None = None,
    ) -> Iterator[Callable[[Meeting], None]]:
        """Take one batch: yields what wants to be told of each meeting; the logits follow at the end.

        Args:
            ids: int64 `batch pos`.
            docs: int64 `batch`, document of each window.
            numbers: of the windows in the whole run; they seed the sample, so batching does not matter.
            only: name of the floor, whose student is the teacher itself.
            teacher: another teacher than the run's (the floor of a low-precision run).
        """
        layouts = self.students if only is None else {only: self.teacher}
        batch = Batch(self, ids, docs, numbers, only or MAIN, teacher or self.teacher, layouts)
        yield batch.met
        batch.finish()

    def meter(self, address: Address, names: Sequence[str], d: int = 0) -> StudentMeter:
        if address not in self.meters:
            self.meters[address] = StudentMeter(
                names, d, n_docs=self.n_docs, n_pos=self.n_pos, seed=self.seed
            )
        return self.meters[address]

    def teacher_meter(self, address: Address, names: Sequence[str], d: int) -> TeacherMeter:
        if address not in self.teachers:
            self.teachers[address] = TeacherMeter(names, d, seed=self.seed)
        return self.teachers[address]

    def names(self, site: str) -> tuple[str, ...]:
        """The metrics that are fed at a site."""
        if site in ("logits", "lens"):
            return self._at.get(site, ())
        update = self._at.get("update", ()) if site in ("attn_out", "mlp_out") else ()
        return (*self._at.get("stream", ()), *update)

    def merge(self, other: Collector) -> Collector:
        """Add another part of the same run."""
        for mine, theirs in ((self.meters, other.meters), (self.teachers, other.teachers)):
            for address, meter in theirs.items():
                if address in mine:
                    mine[address].merge(meter)
                else:
                    mine[address] = meter
        return self

    def state(self) -> dict[str, np.ndarray]:
        """Every sum, by name; `load` of it into a fresh collector goes on bit for bit."""
        return {
            f"{address}//{name}": array
            for meters in (self.teachers, self.meters)
            for address, meter in sorted(meters.items())
            for name, array in meter.state().items()
        }

    def load(self, state: Mapping[str, np.ndarray]) -> Collector:
        groups: dict[str, dict[str, np.ndarray]] = {}
        for key, array in state.items():
            address, _, name = key.partition("//")
            groups.setdefault(address, {})[name] = array
        for text, arrays in groups.items():
            address = Address.parse(text)
            d = self.teacher.d_model
            names = self.names("lens" if address.mode == "lens" else address.site)
            if address.student == TEACHER:
                self.teacher_meter(address, names, d).load(arrays)
            else:
                self.meter(address, names, 0 if address.site == "logits" else d).load(arrays)
        return self

    def rows(self, swapped: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
        """The table, without run id.

        Args:
            swapped: the swapped layers of each student; sites before the first one read exactly the null, because
                they are the teacher's own.
        """
        rows: list[dict[str, Any]] = []
        views: dict[Address, Any] = {}
        for address, meter in sorted(self.meters.items()):
            own = Address(address.scope, TEACHER, "free", address.layer, address.site)
            teacher = self.teachers.get(own)
            if teacher is not None and own not in views:
                views[own] = teacher.view()
            for metric, reading in meter.read(teacher, views.get(own)):
                rows.append(_row(address, metric, reading, swapped.get(address.student, ())))
        for student, layers in swapped.items():
            if student in self.students:
                rows += self._before(student, layers)
                rows += self._resid_pre(student, rows, layers)
        return [*rows, *self._differences()]

    def _before(self, student: str, layers: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Sites in front of the swap: null by construction (and proved on a probe)."""
        first = min(layers, default=self.teacher.n_layers)
        tokens = sum(
            int(m.parts[name].n)
            for a, m in self.meters.items()
            if (a.student, a.site) == (student, "logits")
            for name in list(m.parts)[:1]
        )
        sites = [s for s in BLOCK_SITES if not (s == "resid_mid" and self.teacher.parallel)]
        for layer in range(first + 1):
            for site in sites if layer < first else ("resid_pre",):
                address = Address(MAIN, student, "free", layer, site)
                lens = self.names("lens") if site == "resid_post" else ()
                for metric in (*self.names(site), *lens):
                    for stat, value in load_metric(metric).null.items():
                        reading = Reading(stat, value, value, value, tokens)
                        yield _row(address, metric, reading, layers)

    def _resid_pre(
        self, student: str, rows: list[dict[str, Any]], layers: Sequence[int]
    ) -> list[dict[str, Any]]:
        """The stream entering a block is the one leaving the block before: the same numbers."""
        stream = set(self._at.get("stream", ()))
        first = min(layers, default=self.teacher.n_layers)
        return [
            row
            | {
                "layer": row["layer"] + 1,
                "site": "resid_pre",
                "swapped": row["layer"] + 1 in layers,
            }
            for row in rows
            if row["student"] == student
            and row["mode"] == "free"
            and row["site"] == "resid_post"
            and row["metric"] in stream
            and first <= row["layer"] < self.teacher.n_layers - 1
        ]

    def _differences(self) -> Iterator[dict[str, Any]]:
        """Swap minus each control on the same tokens, by paired bootstrap over documents."""
        place = {s: Address(MAIN, s, "free", NO_LAYER, "logits") for s in self.students}
        if "swap" not in place or place["swap"] not in self.meters:
            return
        own = self.meters[place["swap"]]
        for control, address in place.items():
            if control == "swap" or address not in self.meters:
                continue
            for metric, column in (("kl", "kl"), ("nll", "shift")):
                if metric in own.parts:
                    reading = paired_difference(
                        own.parts[metric],
                        self.meters[address].parts[metric],
                        column=column,
                        stat=f"mean_minus_{control}",
                        seed=self.seed,
                    )
                    yield _row(place["swap"], metric, reading, ())


def _row(address: Address, metric: str, reading: Reading, layers: Sequence[int]) -> dict[str, Any]:
    layer = None if address.layer == NO_LAYER else address.layer
    return {
        "mode": "free" if address.mode == "lens" else address.mode,
        "student": address.student,
        "layer": layer,
        "site": address.site,
        "position": reading.position,
        "metric": metric,
        "stat": reading.stat,
        "value": reading.value,
        "lo": reading.lo,
        "hi": reading.hi,
        "n": reading.n,
        "swapped": layer in layers,
    }
