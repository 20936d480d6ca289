"""Turn meetings of teacher and student into sums, and sums into rows of the table.

One `StudentMeter` per (student, mode, layer, site), one `TeacherMeter` per (layer, site), shared by the students. Nothing
else outlives a batch. Logits are never kept: at the end of a batch the final states go through the head in chunks of
tokens, the teacher's chunk once for all students; a few tokens of each window go through it at every layer (logit lens).

Masks. `valid`: every token, for windows are full. `bulk`: without position 0 and without massive tokens of the teacher
at that site, for they would rule every second moment. `sample`: a seeded part of bulk, so that second moments cost the
same whatever the length of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mismatch.layout import Layout
from mismatch.metrics import load_metric
from mismatch.metrics.base import LogitPair, Pair, Reading, paired_difference
from mismatch.metrics.meter import StudentMeter, TeacherMeter
from mismatch.tracing.sites import BLOCK_SITES, before, massive
from mismatch.tracing.stream import Meeting

CHUNK = 256  # tokens that go through the head at once
LENS_TOKENS = 8  # tokens of each window that go through the head at every layer
MAIN, FLOOR = "main", "floor"


@dataclass(frozen=True, order=True)
class Address:
    """What one meter measures. `scope` keeps the floor's own teacher values apart from the run's."""

    scope: str
    student: str
    mode: str
    layer: int
    site: str

    def __str__(self) -> str:
        return f"{self.scope}|{self.student}|{self.mode}|{self.layer}|{self.site}"

    @classmethod
    def parse(cls, text: str) -> Address:
        scope, student, mode, layer, site = text.split("|")
        return cls(scope, student, mode, int(layer), site)


NO_LAYER = -1  # the layer of `final` and `logits` inside an Address; empty in the table
TEACHER = ""  # the student of a teacher's own meter


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
            self.teacher, self.students, self.metrics, self.n_docs, self.n_pos, self.sample, self.seed
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
        batch = _Batch(self, ids, docs, numbers, only or MAIN, teacher or self.teacher, layouts)
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
        return rows + self._differences()

    def _before(self, student: str, layers: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Sites in front of the swap: null by construction (and proved on a probe)."""
        first = min(layers, default=self.teacher.n_layers)
        tokens = sum(
            int(m.parts[name].n) for a, m in self.meters.items()
            if (a.student, a.site) == (student, "logits") for name in list(m.parts)[:1]
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
            row | {"layer": row["layer"] + 1, "site": "resid_pre", "swapped": row["layer"] + 1 in layers}
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


class _Batch:
    """Everything that lives for one batch."""

    def __init__(
        self,
        collector: Collector,
        ids: Tensor,
        docs: Tensor,
        numbers: Sequence[int],
        scope: str,
        teacher: Layout,
        students: Mapping[str, Layout],
    ) -> None:
        self.collector, self.ids, self.docs, self.scope = collector, ids, docs, scope
        self.teacher, self.students = teacher, students
        self.pairs: dict[tuple[int | None, str], Pair] = {}
        self.streams: dict[tuple[str, str], tuple[str, Tensor, Tensor]] = {}
        self.finals: dict[str, Tensor] = {}
        self.final: Tensor | None = None
        self.lens: dict[int, dict[str, Tensor]] = {}
        self.valid = torch.ones_like(ids, dtype=torch.bool)
        drawn = [_drawn(collector.seed, number, ids.shape[1]) for number in numbers]
        self.drawn = torch.stack(drawn).to(ids.device) < collector.sample
        # The smallest draws of each window are its lens tokens: also independent of the batching.
        self.lens_at = torch.stack([d.argsort()[:LENS_TOKENS] for d in drawn]).to(ids.device)

    def met(self, meeting: Meeting) -> None:
        """One site of one student."""
        key = (meeting.student, meeting.mode)
        if meeting.site in ("resid_pre", "resid_mid"):
            self.streams[key] = (meeting.site, meeting.teacher, meeting.value)
        if meeting.site == "resid_pre":
            return  # the same numbers as resid_post of the block before
        rows = len(meeting.value)
        if meeting.site == "final":
            self.finals[meeting.student], self.final = meeting.value, meeting.teacher
        elif meeting.site == "resid_post" and meeting.mode == "free" and self.collector.names("lens"):
            kept = self.lens.setdefault(meeting.layer, {})
            kept[TEACHER] = self._lens_rows(meeting.teacher)
            kept[meeting.student] = self._lens_rows(meeting.value)
        names = self.collector.names(meeting.site)
        if not names:
            return
        pair = self._pair(meeting, rows)
        layer = NO_LAYER if meeting.layer is None else meeting.layer
        d = meeting.value.shape[-1]
        address = Address(self.scope, meeting.student, meeting.mode, layer, meeting.site)
        self.collector.meter(address, names, d).update(pair)

    def _pair(self, meeting: Meeting, rows: int) -> Pair:
        place = (meeting.layer, meeting.site)
        wanted = before(self.teacher, meeting.site)
        given = self.streams.get((meeting.student, meeting.mode))
        stream = given[1:] if wanted is not None and given is not None and given[0] == wanted else None
        if place in self.pairs:
            return self.pairs[place].with_student(meeting.value, None if stream is None else stream[1])
        valid = self.valid[:rows].to(meeting.value.device)
        bulk = valid & ~massive(meeting.teacher, valid)
        bulk[:, 0] = False
        sample = bulk & self.drawn[:rows].to(bulk.device)
        docs = self.docs[:rows].to(bulk.device)
        pair = Pair(meeting.teacher, meeting.value, docs, valid, bulk, sample, stream)
        self.pairs[place] = pair
        layer = NO_LAYER if meeting.layer is None else meeting.layer
        own = Address(self.scope, TEACHER, "free", layer, meeting.site)
        names = self.collector.names(meeting.site)
        self.collector.teacher_meter(own, names, meeting.value.shape[-1]).update(pair)
        return pair

    def _lens_rows(self, stream: Tensor) -> Tensor:
        at = self.lens_at[: len(stream)].to(stream.device)
        return stream.gather(1, at[..., None].expand(-1, -1, stream.shape[-1]))

    def finish(self) -> None:
        """The logits of every student, then the lens, then nothing of this batch is left."""
        self.pairs.clear()
        self.streams.clear()
        with torch.no_grad():
            if self.finals and self.collector.names("logits"):
                self._logits()
            for layer, kept in self.lens.items():
                self._lens(layer, kept)

    def _logits(self) -> None:
        rows = len(self.final)
        ids = self.ids[:rows]
        targets = torch.full_like(ids, -1)
        targets[:, :-1] = ids[:, 1:]
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        docs = self.docs[:rows, None].expand_as(ids)
        self._through_the_head(
            {TEACHER: self.final, **self.finals}, targets, docs, positions, NO_LAYER, "logits"
        )

    def _lens(self, layer: int, kept: dict[str, Tensor]) -> None:
        rows = len(kept[TEACHER])
        at = self.lens_at[:rows]
        states = {
            name: (self.teacher if name == TEACHER else self.students[name]).final_norm(stream)
            for name, stream in kept.items()
        }
        docs = self.docs[:rows, None].expand_as(at)
        self._through_the_head(states, torch.full_like(at, -1), docs, at, layer, "lens")

    def _through_the_head(
        self,
        states: Mapping[str, Tensor],
        targets: Tensor,
        docs: Tensor,
        positions: Tensor,
        layer: int,
        at: str,
    ) -> None:
        """Chunk by chunk: final states, `batch pos d_model`, to log-probabilities, to every metric `at`."""
        names = self.collector.names(at)
        flat = {name: state.flatten(0, 1) for name, state in states.items()}
        target, doc, position = targets.flatten(), docs.flatten(), positions.flatten()
        site = "resid_post" if at == "lens" else "logits"
        mode = "lens" if at == "lens" else "free"
        for start in range(0, len(target), CHUNK):
            part = slice(start, start + CHUNK)
            teacher = _log_probs(self.teacher, flat[TEACHER][part])
            here = teacher.device
            pair: LogitPair | None = None
            for name, state in flat.items():
                if name == TEACHER:
                    continue
                student = _log_probs(self.students[name], state[part]).to(here)
                pair = (
                    LogitPair(teacher, student, target[part].to(here), doc[part].to(here), position[part].to(here))
                    if pair is None
                    else pair.with_student(student)
                )
                address = Address(self.scope, name, mode, layer, site)
                self.collector.meter(address, names).update(pair)


def _log_probs(layout: Layout, final: Tensor) -> Tensor:
    return layout.head(final).float().log_softmax(-1)


def _drawn(seed: int, number: int, n_pos: int) -> Tensor:
    """One uniform number per position of a window; position 0 draws 1, so it is never chosen."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + number)
    drawn = torch.rand(n_pos, generator=generator)
    drawn[0] = 1.0
    return drawn
