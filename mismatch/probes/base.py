"""The base of a probe: inputs made for one question, the same for every model, and numbers per sample.

A probe is built from a `Setting` before any weight is loaded, so that what cannot be asked is refused early; `run`
runs every `Subject` on its inputs (teacher first, then swap and controls). Its answers are `Measure`s: numerators and
denominators per sample, so that each mean, and each difference between two models on the same inputs, gets a
interval over samples. A sample is a prompt, a window of text or a random sequence.

Rows of the table: metric = the probe, student = `teacher`, `swap` or a control; stat = what was measured.
`X_minus_teacher` is the paired difference of a student to the teacher, `X_minus_C` of the swap to the control C.
A stat that was measured under conditions carries them: `logprob[length=256,depth=0.1]`. What does not apply to a model
(attention weights of a mechanism that has none) is a row without a value, which is not 0.

Facts, read without importing the file:

    headline     the stat that answers the question
    unit         of the headline
    range        of the headline
    better       "higher", "lower" or "none": which direction of the headline means more able
    chance       in words: its value for a model that learned nothing, or a shuffled input
    shows        in words: what the headline shows
    blind        in words: what it cannot see
    source       paper, or the measurement it comes from
    by_batch     whether `run` gives its batches to `Setting.by_batch`, so that ranks share them; a probe that does not
                 is run as a whole by one of them
    needs        "tokens" (made here), "text" (held-out windows), "tokenizer", or "tokenizer, haystack": held-out text
                 where there is some, in which something is hidden; the samples are prompts, not windows
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar, TypeVar

import numpy as np

from mismatch import registry
from mismatch.errors import UsageError
from mismatch.metrics.sums.per_document import Total, Units, estimate
from mismatch.models.layout import Layout
from mismatch.runs.intervals import SAMPLES
from mismatch.runs.plan import Replaced
from mismatch.runs.ranks import ALONE, Ranks
from mismatch.runs.table import SWAP, conditions, under
from mismatch.surgery.operate import Student

TEACHER = "teacher"
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Setting:
    """What the probes of one run share.

    Attributes:
        words: int64, the ids that random tokens are drawn from: no special ones.
        text: int64 `windows pos`, held-out text, one window a row.
        docs, offset: int64 `windows`, the document of each and its place there; offset None: in order.
        tokenizer: of the model; None where no probe needs one.
        opening: ids in front of random tokens and prompts: those that the tokenizer itself puts there.
        bos: the first token of random sequences where `opening` is empty; the attention sink. None: none.
        context: tokens that the model was made for; None = not known.
        model: its name, for errors.
        samples: prompts of each kind, random sequences, windows of text.
        batch_size: sequences per forward pass.
        lengths, depths: of the prompts of passkey and needles.
        lookup_pairs, lookup_length: pairs of a list, and tokens of its prompt.
        travel: how far the planned training can move a gate; None = no plan was given.
        seed: random seed.
        ranks: who this process is among how many.
    """

    words: np.ndarray
    text: np.ndarray
    docs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    offset: np.ndarray | None = None
    tokenizer: Any = None
    opening: tuple[int, ...] = ()
    bos: int | None = None
    context: int | None = None
    model: str = "the model"
    samples: int = 8
    batch_size: int = 4
    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    lookup_pairs: int = 12
    lookup_length: int = 328
    travel: float | None = None
    seed: int = 0
    ranks: Ranks = ALONE

    def by_batch(
        self, count: int, run: Callable[[slice], Mapping[Key, np.ndarray]]
    ) -> dict[Key, np.ndarray]:
        """Numbers of all samples by their names; several ranks share the batches.

        Args:
            count: of samples.
            run: is given a batch of them; returns arrays with one row a sample.
        """
        batches = [slice(at, at + self.batch_size) for at in range(0, count, self.batch_size)]
        parts = self.ranks.shared(batches, run)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def fits(self, length: int, what: str, hint: str) -> None:
        """Check that so many tokens fit into the model's context.

        Raises:
            UsageError: they do not.
        """
        if self.context is not None and length > self.context:
            raise UsageError(
                f"{what} of {length} tokens is longer than the context of {self.model}: "
                f"{self.context} tokens",
                hint=hint,
            )

    def windows(self, what: str, count: int | None = None) -> np.ndarray:
        """The first `count` windows of text (default: `samples`); fewer when there are not so many.

        Raises:
            UsageError: fewer than two.
        """
        found = self.text[: count or self.samples]
        if len(found) < 2:
            raise UsageError(
                f"{what} needs at least 2 windows of text, and there is {len(found)}",
                hint="give longer text, or a smaller --seq-len",
            )
        return found

    @property
    def units(self) -> Units:
        """What the windows of text belong to."""
        offset = None if self.offset is None else self.offset[: self.samples]
        return Units.by(self.docs[: self.samples], offset)

    def draw(self, name: str) -> np.random.Generator:
        """The random generator of one probe: it depends on the seed and the name, not on what else runs."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])


@dataclass(frozen=True)
class Subject:
    """A model that is probed.

    Attributes:
        name: `teacher`, `swap` or a control.
        layout: of its model.
        start: the first block that is not the teacher's own.
        clauses: what surgery replaced.
    """

    name: str
    layout: Layout
    start: int
    clauses: tuple[Replaced, ...] = field(default=(), repr=False)

    @classmethod
    def teacher(cls, layout: Layout) -> Subject:
        """The teacher: nothing is replaced."""
        return cls(TEACHER, layout, layout.n_layers)

    @classmethod
    def of(cls, student: Student) -> Subject:
        """The swap or a control, as surgery made it."""
        first = student.plan.first
        start = student.layout.n_layers if first is None else first
        return cls(student.name, student.layout, start, student.plan.clauses)

    @property
    def swapped(self) -> frozenset[int]:
        """Layers with a replaced module."""
        return frozenset(c.layer for c in self.clauses if c.layer is not None)

    @property
    def segment(self) -> int | None:
        """The segment of its mechanisms in tokens, nested ones too; None without one, or where they differ."""
        inside = (self.layout.model.get_submodule(clause.path).modules() for clause in self.clauses)
        settings: Iterator[Any] = (
            getattr(module, "settings", None) for module in chain.from_iterable(inside)
        )
        found = {own.segment for own in settings if hasattr(own, "segment")}
        return found.pop() if len(found) == 1 else None

    @property
    def whole_blocks(self) -> frozenset[int]:
        """Layers whose block was replaced as a whole: there is no attention in them any more."""
        return frozenset(c.layer for c in self.clauses if c.slot == "block" and c.layer is not None)


@dataclass(frozen=True)
class Measure:
    """One number of one model, by samples: sum of `top` over sum of `bottom`.

    Attributes:
        stat: what was measured, with its conditions.
        top, bottom: float64 `samples`; the same samples in the same order for every model. A sample with `bottom` 0
            is left out.
        n: tokens behind it.
        site, layer, head, position, mode: its address in the table.
        over: what the samples are.
    """

    stat: str
    top: np.ndarray
    bottom: np.ndarray
    n: int
    site: str = "logits"
    layer: int | None = None
    head: int | None = None
    position: str = "all"
    mode: str = "free"
    over: str = SAMPLES

    @classmethod
    def mean(cls, stat: str, values: Any, each: int = 1, **address: Any) -> Measure:
        """The mean of numbers, `samples` or `samples tokens`; `each` is how many tokens stand behind each of them."""
        values = np.asarray(values, dtype=np.float64)
        values = values.reshape(len(values), -1)
        size = np.full(len(values), values.shape[1], float)
        return cls(stat, values.sum(1), size, values.size * each, **address)

    @classmethod
    def number(cls, stat: str, value: float, n: int = 0, **address: Any) -> Measure:
        """One number that is not a mean over samples: it gets no interval."""
        return cls(stat, np.array([value], float), np.ones(1), n, **address)

    @classmethod
    def absent(cls, stat: str, **address: Any) -> Measure:
        """Not applicable to this model."""
        return cls(stat, np.array([math.nan]), np.ones(1), 0, **address)

    @property
    def address(self) -> tuple[Any, ...]:
        """What it must share with the measure of another model to be compared with it."""
        return (self.stat, self.site, self.layer, self.head, self.position, self.mode)

    def by(self, units: Units | None) -> Measure:
        """The same by document (or window after window), where the samples are windows of text."""
        if units is None or len(units.of) != len(self.top):
            return self
        top, bottom = (np.bincount(units.of, x, units.count) for x in (self.top, self.bottom))
        return replace(self, top=top, bottom=bottom, over=units.over)

    def value(self) -> float:
        """The number; nan where every sample is left out."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(self.ratio(np.sum))

    def ratio(self, total: Total) -> Any:
        """The number as a statistic of its samples."""
        return total(self.top) / total(self.bottom)


def swapped_layers(subjects: Sequence[Subject]) -> tuple[int, ...]:
    """Layers that any subject has replaced: probes of one layer measure there, in the teacher too."""
    return tuple(sorted({layer for subject in subjects for layer in subject.swapped}))


Answers = Mapping[str, Sequence[Measure]]
"""The measures of each subject by its name."""


class Probe:
    """Base of all probes; see the module's docstring for the facts.

    `__init__` makes the inputs, and refuses what cannot be asked; it needs no model.
    """

    headline: ClassVar[str]
    unit: ClassVar[str]
    range: ClassVar[str]
    better: ClassVar[str]
    chance: ClassVar[str]
    shows: ClassVar[str]
    blind: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[str]
    by_batch: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def warnings(self) -> tuple[str, ...]:
        """Sentences for the report, after `run`; empty when there is nothing to warn of."""
        return ()

    def run(self, subjects: Sequence[Subject]) -> Answers:
        """Probe every subject; the teacher is the first.

        Raises:
            NumericsError: an answer is NaN or infinite where it should be a number.
        """
        raise NotImplementedError


def rows(
    probe: str,
    answers: Answers,
    swapped: Mapping[str, frozenset[int]],
    units: Units | None = None,
) -> list[dict[str, Any]]:
    """The table's rows of one probe, without run id: each model, and the paired differences.

    Args:
        probe: its name.
        answers: of `Probe.run`.
        swapped: replaced layers of each subject.
        units: of the samples, where they are windows of text.
    """
    answers = {name: [m.by(units) for m in measures] for name, measures in answers.items()}
    sign = _sign(probe)
    found: list[dict[str, Any]] = []
    by_address = {name: {m.address: m for m in measures} for name, measures in answers.items()}
    for name, measures in answers.items():
        for measure in measures:
            found.append(_row(probe, name, measure.stat, measure, None, swapped, sign))
            for other in _compared(name, by_address):
                base = by_address[other].get(measure.address)
                if base is not None and measure.n and base.n:
                    stat = minus(measure.stat, other)
                    found.append(_row(probe, name, stat, measure, base, swapped, sign))
    return found


def _sign(probe: str) -> dict[str, float]:
    """The headline of a probe, where it has one sign: 1 = cannot be negative, -1 = cannot be positive."""
    if probe not in registry.probes().names():
        return {}
    facts = registry.probes().card(probe).facts
    low, high = str(facts["range"]).strip("[]()").split(", ")
    one = 1.0 if float(low) >= 0 else -1.0 if float(high) <= 0 else 0.0
    return {facts["headline"]: one} if one else {}


def minus(stat: str, other: str) -> str:
    """`logprob[depth=0.1]` -> `logprob_minus_teacher[depth=0.1]`."""
    name, given = conditions(stat)
    return under(f"{name}_minus_{other}", **given)


def _compared(name: str, students: Iterable[str]) -> Iterator[str]:
    """The subjects that one is compared with: the teacher, and of the swap each control too."""
    if name != TEACHER:
        yield TEACHER
    if name == SWAP:
        yield from (other for other in students if other not in (SWAP, TEACHER))


def _row(
    probe: str,
    student: str,
    stat: str,
    measure: Measure,
    base: Measure | None,
    swapped: Mapping[str, frozenset[int]],
    sign: Mapping[str, float],
) -> dict[str, Any]:
    one = sign.get(conditions(stat)[0], 0.0) if base is None else 0.0
    # Measures of other samples than the base's are not paired: no interval.
    paired = base is None or len(base.top) == len(measure.top)
    found = estimate(
        lambda total: (
            (one or 1.0) * (measure.ratio(total) - (0.0 if base is None else base.ratio(total)))
        ),
        measure.bottom if paired else measure.bottom[:1],  # one sample: no interval
        measure.over,
        positive=one != 0,
    )
    if one < 0:  # as a number that cannot be negative, and back
        found = found._replace(value=-found.value, lo=-found.hi, hi=-found.lo)
    return {
        "mode": measure.mode,
        "student": student,
        "layer": measure.layer,
        "site": measure.site,
        "head": measure.head,
        "position": measure.position,
        "metric": probe,
        "stat": stat,
        "value": found.value,
        "lo": found.lo,
        "hi": found.hi,
        "over": found.over,
        "n": measure.n,
        "swapped": measure.layer in swapped.get(student, ()),
    }
