"""One command, opened once: config, model folder, tokenizer, texts cut once, ranks, and later the weights.

Every stage gets one `Opened`. What costs something (a hub look-up, a tokenizer, a text) is made when it is first asked
for and kept. What was given from Python (a loaded model, a student, documents) stands in for what the config names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mismatch import spec
from mismatch.config import SwapConfig, fields
from mismatch.models.families import family_of
from mismatch.models.layout import Layout
from mismatch.models.load import ModelInfo, load_tokenizer, read_config
from mismatch.models.skeleton import skeleton_of
from mismatch.models.tokenizer import need_tokenizer
from mismatch.runs.folder import RunFolder
from mismatch.runs.ranks import ALONE, Ranks
from mismatch.runs.state import State
from mismatch.stages.base import C
from mismatch.stages.chosen_on import ChosenOn
from mismatch.stages.fitting import Fitting
from mismatch.stages.given import GivenStudent
from mismatch.stages.loaded import load
from mismatch.stages.text_role import Text
from mismatch.surgery import loading, operate
from mismatch.surgery.controls import control_specs
from mismatch.surgery.operate import Student, placed
from mismatch.surgery.students import Teacher, students_of
from mismatch.texts.documents import Documents, calibration_and_evaluation, read, split
from mismatch.texts.windows import Windows, windows

FIELDS = {"evaluation": "data", "calibration": "calibration_data", "training": "train_data"}
"""Role of a text -> the setting that names its source."""


class Opened(Fitting[C]):
    """Everything a stage works with.

    Args:
        config: the settings.
        teacher: a model that is loaded already; None: the one that the config names, when `load` is called.
        student: a student or a model that is there already; None: the one that the config names, or its swap.
        given: text by setting (`data`, `calibration_data`, `train_data`) that a Python caller handed over.
        ranks: who this process is among how many.
        progress: talk on stderr.
        overwrite: run folders may take the place of earlier runs.
    """

    def __init__(
        self,
        config: C,
        *,
        teacher: Teacher | None = None,
        student: Student | Teacher | None = None,
        given: Mapping[str, Any] | None = None,
        ranks: Ranks = ALONE,
        progress: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.config = config
        self.student: Student | None = None
        """One that is not swapped here: with its weights and compared with the teacher, behind `load`."""
        self.given = dict(given or {})
        self.ranks = ranks
        self.progress = progress
        self.overwrite = overwrite
        self.texts: dict[str, Text] = {}
        """By role, what was cut: goes into the manifest with its fingerprint."""
        self.earlier: dict[str, dict[str, Any]] = {}
        """By role, texts of an earlier run that this one builds on, as its manifest tells of them."""
        self.folder: RunFolder | None = None
        """On the first rank, once the weights are loaded; None when nothing is written."""
        self.path: Path | None = None
        """Of the run folder, on every rank."""
        self._teacher = teacher
        self._elsewhere: GivenStudent | None = None
        if student is not None or getattr(config, "student", None) is not None:
            self._elsewhere = GivenStudent(self.swap_config, student)
        self._planned: list[Student] | None = None

    def child(self, config: Any) -> Opened[Any]:
        """The same model and given texts under other settings: a stage inside a stage."""
        made: Opened[Any] = Opened(
            config,
            teacher=self._teacher,
            student=None if self._elsewhere is None else self._elsewhere.given,
            given=self.given,
            ranks=self.ranks,
            progress=self.progress,
            overwrite=self.overwrite,
        )
        made.tokenizer, made.skeleton = self.tokenizer, self.skeleton
        made.batch = self.batch
        if self._teacher is None:
            made.source = self.source
        made.fit()
        return made

    # ---- the model ----------------------------------------------------------------------------------

    @cached_property
    def source(self) -> tuple[Any, Any]:
        """transformers' config of the model, and where it lies: one look-up for all that follows."""
        config = self.config
        return read_config(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )

    @property
    def model_config(self) -> Any:
        """transformers' config of the model."""
        return self.source[0] if self._teacher is None else self._teacher.model.config

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        if self._teacher is not None:
            return need_tokenizer(self._teacher.tokenizer)
        return load_tokenizer(self.source[1].folder, self.config.trust_remote_code)

    @cached_property
    def skeleton(self) -> Layout:
        """The model without its weights, on the meta device.

        Raises:
            LayoutError: its family is not known.
        """
        if self._teacher is not None:
            return skeleton_of(self._teacher.layout)
        family_of(self.model_config)
        return loading.skeleton(self.source, trust_remote_code=self.config.trust_remote_code)

    @property
    def teacher(self) -> Teacher:
        """The untouched model, with its weights."""
        if self._teacher is None:
            raise RuntimeError("the weights are not loaded yet")
        return self._teacher

    @property
    def models(self) -> tuple[Any, ...]:
        """Those that were handed over: they are the caller's, too."""
        given = None if self._elsewhere is None else self._elsewhere.given
        return tuple(one.model for one in (self._teacher, given) if one is not None)

    def take(self, teacher: Teacher) -> None:
        """A teacher that another command loaded."""
        self._teacher = teacher

    def load(self) -> None:
        """Read the weights.

        Raises:
            ModelError: there are none, or they are not what the config says.
        """
        config = self.config
        if self._teacher is None:
            self._teacher = load(
                self.source[1],
                dtype=config.dtype,
                device=None if config.device_map else self.ranks.device(config.device),
                device_map=config.device_map,
                trust_remote_code=config.trust_remote_code,
                allow_pickle=config.allow_pickle,
                tokenizer=self.tokenizer,
            )
        if self._elsewhere is not None:
            device = None if config.device_map else self.ranks.device(config.device)
            foreseen = self.planned()[0]
            self.student = self._elsewhere.adopted(self._teacher, foreseen, device)

    def fit(self) -> None:
        """Fit the settings to the model's context, before anything else is asked.

        Raises:
            UsageError: windows that were asked for do not fit.
            ModelError: no such model.
        """
        context = getattr(self.model_config, "max_position_embeddings", None)
        before, self.config = self.config, self.config.fitted(context)
        shorter = [
            f"--{name.replace('_', '-')} {','.join(map(str, value if isinstance(value, tuple) else [value]))}"
            for name in fields(type(before))
            if (value := getattr(self.config, name)) != getattr(before, name)
        ]
        if shorter:
            self.say(f"{' '.join(shorter)}: {before.model} has a context of {context} tokens")

    # ---- swap and controls --------------------------------------------------------------------------

    def planned(self) -> list[Student]:
        """The swap and its controls, built on the meta device.

        Raises:
            MismatchError: whatever would be refused of model, swap and controls.
        """
        if self._planned is None:
            self._planned = self._plan()
        return self._planned

    def _plan(self) -> list[Student]:
        if self._elsewhere is not None:
            first = self._elsewhere.foreseen(self.skeleton, self.tokenizer)
        else:
            first = self._on_meta(self.swap_config.swap_spec)
        controls = control_specs(self.config.controls, first.plan)
        return [first, *(self._on_meta(spec_) for spec_ in controls.values())]

    @property
    def swap_config(self) -> SwapConfig:
        """The settings of a stage that is about one swap."""
        assert isinstance(self.config, SwapConfig)
        return self.config

    def _on_meta(self, parsed: spec.Spec) -> Student:
        skeleton = self.skeleton
        return operate.operate(skeleton, placed(parsed, skeleton), spec=spec.format(parsed))

    @property
    def has_student(self) -> bool:
        """Whether the student is there already, and is not swapped here."""
        return self._elsewhere is not None

    @property
    def student_info(self) -> ModelInfo | None:
        """Name and fingerprint of a student that was trained elsewhere, behind `load`."""
        return None if self._elsewhere is None else self._elsewhere.info

    def students(self, calibration: Windows | None) -> list[Student]:
        """The swap first, then its controls in the same slots, with weights.

        Args:
            calibration: windows for mechanisms that set themselves from them.

        Raises:
            MismatchError: as `mismatch.surgery.students.students_of`.
        """

        def built(config: Any) -> list[Student]:
            return students_of(self.teacher, config, calibration, self.student)

        return self.fitting(built, "while the students were built")

    # ---- text ---------------------------------------------------------------------------------------

    def documents(self, role: str) -> Documents:
        """The documents of a role: what was given, or what the setting names. Of evaluation text those that an earlier
        run chose on are left out.

        Raises:
            DataError: text that is missing, unreadable or empty, or all chosen on.
        """
        found = self._read(self.text_of(role))
        return self._reportable(found) if role == "evaluation" else found

    @cached_property
    def chosen_on(self) -> ChosenOn | None:
        """What an earlier run chose, calibrated or trained on; None: the settings name no such run.

        Raises:
            RunError: no run there, or it does not say.
        """
        earlier = getattr(self.config, "selected_by", None)
        return None if earlier is None else ChosenOn.of(earlier)

    def _reportable(self, documents: Documents) -> Documents:
        """The documents that numbers may be reported on; with --allow-overlap all of them."""
        if self.chosen_on is None or getattr(self.config, "allow_overlap", False):
            return documents
        return self.chosen_on.without(documents)

    def _read(self, source: Any) -> Documents:
        return read(source, field=self.config.text_field, tokenizer=self.tokenizer)

    def text_of(self, role: str) -> Any:
        """What the caller gave for a role, or the name that the setting holds."""
        name = FIELDS[role]
        return self.given.get(name, getattr(self.config, name, None))

    def apart(self, *, calibrates: bool) -> tuple[Documents | None, Documents]:
        """Calibration and evaluation documents, disjoint; of one source they are divided.

        Args:
            calibrates: whether anything sets itself from calibration text; it is read only then.

        Raises:
            DataError: as `documents`; a document in both.
        """
        calibration, evaluation = self.text_of("calibration"), self.text_of("evaluation")
        if _same(calibration, evaluation):
            first, second = split(self._read(evaluation))
            return first, self._reportable(second)
        if calibrates:
            first, second = calibration_and_evaluation(
                self._read(calibration), self._read(evaluation)
            )
            return first, self._reportable(second)
        return None, self._reportable(self._read(evaluation))

    def cut(
        self, role: str, documents: Documents, tokens: int, *, seq_len: int | None = None
    ) -> Windows:
        """Windows of a text in its role, remembered for the manifest.

        Args:
            role: evaluation, calibration, training, validation or selection.
            documents: to cut.
            tokens: how many.
            seq_len: tokens per window; None: as the config says.

        Raises:
            DataError: too little text.
        """
        made = windows(
            documents,
            self.tokenizer,
            seq_len or self.config.seq_len,
            tokens,
            self.config.seed,
            answers=role in ("evaluation", "validation")
            and getattr(self.config, "answers_only", False),
        )
        self.texts[role] = Text(documents, made, self._overlap(role, documents, made))
        return made

    def _overlap(self, role: str, documents: Documents, made: Windows) -> int:
        """How many evaluated documents an earlier run chose on."""
        if role != "evaluation" or self.chosen_on is None:
            return 0
        return self.chosen_on.read_in(documents, made)

    def calibration(self, wanted: int, documents: Documents | None = None) -> Windows | None:
        """Windows that mechanisms set themselves from.

        Args:
            wanted: tokens, where the settings name no number; 0: nothing calibrates.
            documents: of the role; None reads them.

        Raises:
            DataError: as `documents` and `cut`.
        """
        if wanted == 0:
            return None
        tokens = self.config.calibration_tokens or wanted
        length = min(self.config.seq_len, tokens)
        text = self.documents("calibration") if documents is None else documents
        return self.cut("calibration", text, tokens, seq_len=length)

    # ---- what a run writes and says -----------------------------------------------------------------

    def fingerprints(self) -> dict[str, str]:
        """All that must be equal for a stopped run to go on."""
        return {
            "settings": self.config.fingerprint(),
            "model": self.teacher.info.sha256,
            "ranks": str(self.ranks.world),
            **({} if self.student_info is None else {"student": self.student_info.sha256}),
            **{role: text.cut.fingerprint for role, text in self.texts.items()},
        }

    def state(self, part: str = "") -> State | None:
        """Where this rank saves what it goes on from: the first rank in front, the others below."""
        if self.path is None:
            return None
        folder = self.path / "state" / part
        return State(folder if self.ranks.first else folder / f"rank{self.ranks.rank}")

    def say(self, line: str) -> None:
        """One line for the person who waits, and for log.txt."""
        if self.progress and self.ranks.first:
            print(line, file=sys.stderr, flush=True)
        if self.folder is not None:
            self.folder.log(line)

    @contextmanager
    def bar(self, total: int, what: str, unit: str) -> Iterator[tqdm[Any]]:
        """A progress bar on stderr; silent when nobody looks."""
        silent = None if self.progress and self.ranks.first else True
        with tqdm(total=total, desc=what, unit=unit, file=sys.stderr, disable=silent) as bar:
            yield bar


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, (str, Path)) and isinstance(other, (str, Path)) and one == other
