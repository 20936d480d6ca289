"""The swap taken apart: corrections of every place, fitted; which students they make; what their fits say.

A correction acts at all places at once, each with its own fit. Heads are restored one place at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mismatch import spec
from mismatch.errors import LayoutError, SpecError, SurgeryError
from mismatch.forward.heldout import Batch, Trial
from mismatch.forward.hooks import on_device
from mismatch.mechanisms.base import Mechanism
from mismatch.models.layout import Layout
from mismatch.stages.diagnose.config import DiagnoseConfig
from mismatch.stages.diagnose.corrections import CAUSES, SUBSETS, Change, Fitted, fit
from mismatch.stages.diagnose.fits import Known, Sample, same
from mismatch.stages.diagnose.forced import (
    Side,
    changed,
    forced,
    head_given,
    heads_shared,
    teacher_sides,
)
from mismatch.stages.diagnose.places import Place
from mismatch.surgery.operate import Student
from mismatch.surgery.students import Teacher, calibrated_swap
from mismatch.texts.windows import Windows

HEAD_BATCHES = 2
"""Of calibration text, by which heads are ranked."""
WORTH = 0.01
"""A head that recovers less of the squared error is not tried."""


@dataclass(frozen=True)
class Asked:
    """One correction, and the trial that measures it (one that is never run does nothing)."""

    name: str
    group: str
    trial: str
    layer: int | None = None
    head: int | None = None


class TakenApart:
    """Reads calibration text at every place; `fit` then makes the corrections.

    Args:
        teacher: the untouched model.
        student: the swap.
        places: where it acts.
        config: the settings.
        cut: windows of calibration text.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Student,
        places: Sequence[Place],
        config: DiagnoseConfig,
        cut: Windows,
    ) -> None:
        self.teacher, self.student, self.places = teacher.layout, student.layout, tuple(places)
        self.config = config
        self.not_applicable: list[str] = []
        self.fitted: dict[Place, Fitted] = {}
        """By place; empty before `fit`."""
        self.asked: list[Asked] = []
        self._made: dict[tuple, str] = {}
        self._same: dict[str, str] = {}
        self._bare = self._without_rope(teacher)
        self._counts = {p: heads_shared(self.teacher, self.student, p) for p in places}
        self._left: dict[Place, list[float]] = {}
        self._samples = self._read(cut)

    # ---- calibration text -----------------------------------------------------------------------

    def _without_rope(self, teacher: Teacher) -> Layout | None:
        """The teacher without rotary embedding at the places that have one."""
        layers = sorted({p.layer for p in self.places if p.site != "mlp_out"})
        try:
            if not layers:
                raise SurgeryError("no attention is swapped")
            text = f"layers[{','.join(map(str, layers))}]:nope"
            return calibrated_swap(teacher, spec.parse(text)).layout
        except (SpecError, SurgeryError, LayoutError) as reason:
            self.not_applicable.append(f"rope: {reason.message.splitlines()[0]}")
            return None

    @torch.no_grad()
    def complete(self, ids: Tensor, sides: dict[Place, Side]) -> None:
        """Add the update without rotary embedding."""
        if self._bare is None:
            return
        for place, side in sides.items():
            if place.site != "mlp_out":
                side.bare = forced(self._bare, place, ids, side)

    @torch.no_grad()
    def _read(self, cut: Windows) -> dict[Place, Sample]:
        parts: dict[Place, list[Sample]] = {place: [] for place in self.places}
        for number, part in enumerate(cut.batches(self.config.batch_size)):
            ids = on_device(self.teacher, part.ids)
            sides, _, _ = teacher_sides(self.teacher, self.places, ids)
            self.complete(ids, sides)
            for place, side in sides.items():
                parts[place].append(Sample(side.known, forced(self.student, place, ids, side)))
                if number < HEAD_BATCHES and self.config.heads:
                    self._rank(place, ids, side, parts[place][-1])
        return {place: joined(found) for place, found in parts.items()}

    def _rank(self, place: Place, ids: Tensor, side: Side, sample: Sample) -> None:
        """What is left of the squared error with each head restored; the last number is with none."""
        count = self._counts[place]
        left = self._left.setdefault(place, [0.0] * (count + 1))
        left[count] += sample.error(same)
        for head in range(count):
            assert side.heads is not None  # it is there where heads are counted
            with head_given(self.student, place, head, count, side.heads):
                ours = forced(self.student, place, ids, side)
            left[head] += sample.error(partial(_given, ours))

    def head_errors(self, place: Place) -> list[float]:
        """Share of the squared error at a place that each head recovers, on calibration text."""
        *left, whole = self._left.get(place, [0.0])
        return [1 - one / whole for one in left] if whole > 0 else []

    # ---- corrections ----------------------------------------------------------------------------

    def fit(self) -> None:
        """Fit every correction at every place."""
        self.fitted = {place: fit(sample) for place, sample in self._samples.items()}

    def trials(self, sides: Sequence[Mapping[Place, Side]]) -> list[Trial]:
        """What there is to evaluate, on text of which these are the sides by batch; also fills `asked`."""
        self._sides = sides
        found: list[Trial] = []
        for cause, names in CAUSES.items():
            for name in names:
                self.asked.append(Asked(name, cause, name))
                found += self._changes(name, {p: f.single[name] for p, f in self.fitted.items()})
        for chosen in SUBSETS:
            changes = {p: f.joint[chosen] for p, f in self.fitted.items()}
            found += self._changes(joint_name(chosen), changes)
        if len(self.places) > 1:
            for place in self.places:
                name = f"layer {place.layer} {place.site}"
                self.asked.append(Asked(name, "part", name, place.layer))
                found += self._changes(name, {place: _whole})
        return [*found, *self._head_trials(), *self._branch_trials()]

    def _changes(self, name: str, changes: dict[Place, Change | None]) -> list[Trial]:
        used = {place: change for place, change in changes.items() if change is not None}
        key = tuple((place, id(change)) for place, change in used.items())
        self._same[name] = self._made.setdefault(key, name)
        if not used or self._same[name] != name:
            return []

        @contextmanager
        def during(batch: Batch) -> Iterator[None]:
            with ExitStack() as stack:
                for place, change in used.items():
                    known = self._sides[batch.number][place].known
                    stack.enter_context(
                        changed(
                            self.student,
                            place,
                            partial(_applied, change, known),
                        )
                    )
                yield

        return [Trial(name, self.student, during)]

    def trial_of(self, name: str) -> str:
        """The trial that measured a correction: one that does the very same is not run again."""
        return self._same.get(name, name)

    def _head_trials(self) -> list[Trial]:
        found = []
        if self.config.heads and not any(self._counts.values()):
            self.not_applicable.append(
                "heads: the swapped module does not share the output projection of the teacher's heads"
            )
        ranked = sorted(
            (
                (share, place, head)
                for place in self.places
                for head, share in enumerate(self.head_errors(place))
                if share > WORTH
            ),
            key=lambda one: -one[0],
        )
        for _, place, head in ranked[: self.config.heads]:
            name = f"head {head}" if len(self.places) == 1 else f"layer {place.layer}, head {head}"
            self.asked.append(Asked(name, "part", name, place.layer, head))

            def during(
                batch: Batch, place: Place = place, head: int = head
            ) -> AbstractContextManager[None]:
                heads = self._sides[batch.number][place].heads
                assert heads is not None
                return head_given(self.student, place, head, self._counts[place], heads)

            found.append(Trial(name, self.student, during))
        return found

    def _branch_trials(self) -> list[Trial]:
        """Each branch taken out, and each thing restored, at all places that name it."""
        modules = [
            module
            for place in self.places
            for path in place.paths
            for module in self.student.model.get_submodule(path).modules()
            if isinstance(module, Mechanism)
        ]
        found = []
        for kind, word in (("branches", "without"), ("restores", "with")):
            names = dict.fromkeys(name for module in modules for name in getattr(module, kind)())
            for name in names:

                @contextmanager
                def during(_batch: Batch, kind: str = kind, name: str = name) -> Iterator[None]:
                    with ExitStack() as stack:
                        for module in modules:
                            # A context is used up by one use: ask for a new one each time.
                            if (context := getattr(module, kind)().get(name)) is not None:
                                stack.enter_context(context)
                        yield

                said = f"{word} {name}"
                self.asked.append(Asked(said, "part", said))
                found.append(Trial(said, self.student, during))
        if not found:
            mechanisms = ", ".join(dict.fromkeys(m for p in self.places for m in p.mechanisms))
            self.not_applicable.append(
                f"branches: {mechanisms} names no branch and nothing that it could restore"
            )
        return found

    # ---- numbers --------------------------------------------------------------------------------

    @torch.no_grad()
    def facts(
        self, batches: Sequence[Batch], on: Sequence[Mapping[Place, Side]]
    ) -> Iterator[dict[str, Any]]:
        """What `Found.places` says of each place, on held-out text with these sides by batch."""
        for place in self.places:
            sides = [batch_sides[place] for batch_sides in on]
            sample = joined(
                [
                    Sample(side.known, forced(self.student, place, batch.ids, side))
                    for batch, side in zip(batches, sides, strict=True)
                ]
            )
            fitted = self.fitted[place]
            unit = sample.error(torch.zeros_like) or 1.0
            errors = {
                name: sample.after(change).error(same) / unit
                for name, change in fitted.single.items()
            }
            forced_error = sample.error(same) / unit
            stream = torch.cat([side.onto.float().norm(dim=-1).cpu() for side in sides])
            yield {
                "layer": place.layer,
                "site": place.site,
                "mechanisms": list(place.mechanisms),
                "forced_error": forced_error,
                "linear_error": errors["linear"],
                "corrected_error": errors,
                "update_to_stream": _median(sample.teacher, stream, sample.bulk),
                "update_to_stream_student": _median(sample.student, stream, sample.bulk),
                "fitted": fitted.facts,
                "head_errors": self.head_errors(place),
            }


def _given(value: Tensor, _student: Tensor) -> Tensor:
    return value


def _applied(change: Any, known: Known, student: Tensor) -> Tensor:
    changed: Tensor = change(student, known)
    return changed


def joint_name(causes: tuple[str, ...]) -> str:
    """The trial in which these causes are corrected together."""
    return f"causes={'+'.join(causes)}"


def joined(samples: Sequence[Sample]) -> Sample:
    """Batches of one place as one sample, on the CPU."""
    known = [sample.known for sample in samples]
    bare = None
    if known[0].bare is not None:
        bare = torch.cat([k.bare.float().cpu() for k in known if k.bare is not None])
    update = torch.cat([k.update.float().cpu() for k in known])
    massive = torch.cat([k.massive.cpu() for k in known])
    student = torch.cat([sample.student.float().cpu() for sample in samples])
    return Sample(Known(update, bare, massive), student)


def _whole(_s: Tensor, known: Known) -> Tensor:
    return known.update


def _median(update: Tensor, stream: Tensor, bulk: Tensor) -> float:
    return float((update.float().norm(dim=-1) / stream)[bulk].median())
