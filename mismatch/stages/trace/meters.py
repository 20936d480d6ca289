"""Turn pairs of teacher and student at a site into sums, and sums into rows of the table.

One `StudentMeter` per (student, mode, layer, site), one `TeacherMeter` per (layer, site), shared by the students.
Nothing else outlives a batch (`mismatch.stages.trace.batch`), so memory does not grow with the text.
Collectors merge in any
order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mismatch.forward.paired_sites import SitePair
from mismatch.metrics import load_metric
from mismatch.metrics.base import Reading
from mismatch.metrics.sums.meter import StudentMeter, TeacherMeter
from mismatch.metrics.sums.per_document import Units
from mismatch.models.layout import Layout
from mismatch.runs.plan import SwapPlan
from mismatch.runs.site_names import BLOCK_SITES, SITES
from mismatch.runs.table import FLOOR, GROWTH, MAIN, SWAP
from mismatch.stages.trace.address import NO_LAYER, TEACHER, Address
from mismatch.stages.trace.batch import Batch

M = TypeVar("M", StudentMeter, TeacherMeter)

COMPARED = ("kl", "nll", "lens_kl", "rel_l2", "norm_ratio", "update_size")
"""The metrics that controls get too."""


@dataclass
class Collector:
    """The sums of one run.

    Args:
        teacher: layout of the untouched model.
        students: layout of each student by name (swap, controls).
        plans: of each student: sites in front of its first block that differs read exactly the null.
        metrics: names.
        units: of the run's windows: what sums are kept by.
        n_pos, n_tokens: tokens per window, tokens in all that count.
        sample: share of the tokens that feed the metrics of second moments.
        seed: of the sample and of the lens tokens.
        everywhere: metrics of covariances behind every block.
        sites: that have rows.
    """

    teacher: Layout
    students: Mapping[str, Layout]
    plans: Mapping[str, SwapPlan]
    metrics: Sequence[str]
    units: Units
    n_pos: int
    n_tokens: int
    sample: float = 1.0
    seed: int = 0
    everywhere: bool = False
    sites: Sequence[str] = SITES
    meters: dict[Address, StudentMeter] = field(default_factory=dict, repr=False)
    teachers: dict[Address, TeacherMeter] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._fed = {name: load_metric(name) for name in self.metrics}

    def fresh(self) -> Collector:
        """An empty one with the same settings."""
        return replace(self, meters={}, teachers={})

    def clear(self) -> None:
        """Let go of all sums."""
        self.meters.clear()
        self.teachers.clear()

    @contextmanager
    def batch(
        self,
        ids: Tensor,
        numbers: Sequence[int],
        scored: Tensor | None = None,
        *,
        teacher: Layout | None = None,
    ) -> Iterator[Callable[[SitePair], None]]:
        """Take one batch: yields what wants to be told of each meeting; the logits follow at the end.

        Args:
            ids: int64 `batch pos`.
            numbers: of the windows in the whole run; they name their units and seed the sample, so batching does not
                matter.
            scored: bool `batch pos`, the tokens that count; None: all. The floor counts all.
            teacher: another teacher than the run's (the floor of a low-precision run).
        """
        units = torch.from_numpy(self.units.of[list(numbers)]).to(ids.device)
        batch = Batch(self, ids, units, numbers, scored, teacher or self.teacher)
        yield batch.met
        batch.finish()

    def meter(self, address: Address, d: int = 0) -> StudentMeter:
        """The sums at an address, made when first asked for."""
        if address not in self.meters:
            names = self.names(address.student, address.layer, address.site)
            self.meters[address] = StudentMeter(
                names, d, n_docs=self.units.count, n_pos=self.n_pos, units=self.units.over
            )
        return self.meters[address]

    def teacher_meter(self, address: Address, d: int) -> TeacherMeter:
        """The teacher's own sums at an address: what any student needs of them there."""
        if address not in self.teachers:
            student = SWAP if address.scope == MAIN else FLOOR
            names = self.names(student, address.layer, address.site)
            self.teachers[address] = TeacherMeter(names, d)
        return self.teachers[address]

    def names(self, student: str, layer: int, site: str) -> tuple[str, ...]:
        """The metrics that are fed at a site of a student.

        Controls get what is compared with the swap, and no more: they bound its scale. Metrics of full covariances
        cost d^2 to hold and d^3 to read, so they are taken of the swap alone: in what the swapped layers add, in the
        stream behind them, behind the last block and in the final states; behind every block when the user named
        the metrics (`everywhere`).
        """
        if site not in self._summed:
            return ()
        update = site in ("attn_out", "mlp_out")
        swapped = layer in self._swapped(student)
        behind = site == "resid_post" and (
            swapped or self.everywhere or layer == self.teacher.n_layers - 1
        )
        moments = student == SWAP and (behind or site == "final" or (update and swapped))
        at = {"logits": ("logits",), "lens": ("lens",)}.get(
            site, ("stream", "update") if update else ("stream",)
        )
        return tuple(
            name
            for name, metric in self._fed.items()
            if metric.at in at
            and (metric.state != "moments" or moments)
            and (student in (SWAP, FLOOR, TEACHER) or name in COMPARED)
        )

    @property
    def _summed(self) -> set[str]:
        """The sites that rows are made of; the lens is of the stream leaving a block."""
        entering = ("resid_post",) if "resid_pre" in self.sites else ()
        lens = ("lens",) if "resid_post" in self.sites else ()
        return {*self.sites, *entering, *lens}

    def _swapped(self, student: str) -> tuple[int, ...]:
        """Layers with a replaced module; none of the floor and the teacher."""
        return self.plans[student].layers if student in self.plans else ()

    def _first(self, student: str) -> int:
        """The first block that is not the teacher's own; behind the last one where all are."""
        first = self.plans[student].first
        return self.teacher.n_layers if first is None else first

    def merge(self, other: Collector) -> Collector:
        """Add another part of the same run."""
        _merge(self.meters, other.meters)
        _merge(self.teachers, other.teachers)
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
            place, _, name = key.partition("//")
            groups.setdefault(place, {})[name] = array
        for text, arrays in groups.items():
            address = Address.parse(text)
            d = self.teacher.d_model
            if address.student == TEACHER:
                self.teacher_meter(address, d).load(arrays)
            else:
                self.meter(address, 0 if address.site in ("logits", "lens") else d).load(arrays)
        return self

    def rows(self) -> list[dict[str, Any]]:
        """The table, without run id."""
        rows: list[dict[str, Any]] = []
        for address, meter in sorted(self.meters.items()):
            teacher = self.teachers.get(address.of_teacher())
            rows += [self._row(address, *found) for found in meter.read(teacher)]
        for student in self.students:
            rows += self._before(student)
            rows += self._resid_pre(student, rows)
        found = [*rows, *self._growth(), *self._differences()]
        return [row for row in found if row["site"] in self.sites]

    def _before(self, student: str) -> Iterator[dict[str, Any]]:
        """Sites in front of the swap: null by construction (and proved on a probe)."""
        plan = self.plans[student]
        if plan.front:
            return  # nothing is the teacher's own
        first = self._first(student)
        sites = [s for s in BLOCK_SITES if not (s == "resid_mid" and self.teacher.parallel)]
        # A student with another final norm or head reads another lens out of the same stream.
        same = not plan.end
        for layer in range(min(first + 1, self.teacher.n_layers)):
            for site in sites if layer < first else ("resid_pre",):
                address = Address(MAIN, student, "free", layer, site)
                lens = self.names(student, layer, "lens") if site == "resid_post" and same else ()
                for metric in (*self.names(student, layer, site), *lens):
                    for stat, value in self._fed[metric].null.items():
                        yield self._row(
                            address, metric, Reading(stat, value, value, value, self.n_tokens)
                        )

    def _resid_pre(self, student: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The stream entering a block is the one leaving the block before: the same numbers."""
        layers, first = self._swapped(student), self._first(student)
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
            and self._fed[row["metric"]].at == "stream"
            and first <= row["layer"] < self.teacher.n_layers - 1
        ]

    def _row(self, address: Address, metric: str, reading: Reading) -> dict[str, Any]:
        layer = None if address.layer == NO_LAYER else address.layer
        return {
            "mode": address.mode,
            "student": address.student,
            "layer": layer,
            "site": "resid_post" if address.site == "lens" else address.site,
            "metric": metric,
            **reading.as_row(),
            "swapped": layer in self._swapped(address.student),
        }

    def _growth(self) -> Iterator[dict[str, Any]]:
        """How far off the stream is behind the last block, over how far it is behind the swap, on the same tokens."""
        layers, last = self._swapped(SWAP), self.teacher.n_layers - 1
        if not layers or max(layers) == last:
            return
        ends = [Address(MAIN, SWAP, "free", layer, "resid_post") for layer in (max(layers), last)]
        if all(at in self.meters and "rel_l2" in self.meters[at].parts for at in ends):
            before, behind = (self.meters[at].parts["rel_l2"].per_document("ratio") for at in ends)
            if before.total > 0:
                yield self._row(ends[1], "rel_l2", Reading.of(GROWTH, behind.over(before)))

    def _differences(self) -> Iterator[dict[str, Any]]:
        """Swap minus each control on the same tokens, by the paired interval."""
        place = {s: Address(MAIN, s, "free", NO_LAYER, "logits") for s in self.students}
        own = self.meters.get(place[SWAP])
        for control, address in place.items():
            if control == SWAP or own is None or address not in self.meters:
                continue
            for metric, column in (("kl", "kl"), ("nll", "shift")):
                if metric in own.parts:
                    ours, theirs = (
                        meter.parts[metric].per_document(column)
                        for meter in (own, self.meters[address])
                    )
                    reading = Reading.of(f"mean_minus_{control}", (ours - theirs).mean())
                    yield self._row(place[SWAP], metric, reading)


def _merge(mine: dict[Address, M], theirs: Mapping[Address, M]) -> None:
    for address, meter in theirs.items():
        if address in mine:
            mine[address].merge(meter)
        else:
            mine[address] = meter
