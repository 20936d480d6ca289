"""What a stage is: one command, one function, one kind of run. It has only what is its own; the runner does the rest.

    name in STAGES      `mismatch NAME`, `mismatch.NAME(...)`, the kind of its runs
    Config              its settings: flags, keyword arguments and config.yaml are made from the fields
    prepare(opened)     everything that can be refused, before weights are loaded
    run(opened, ...)    the work: rows of the table, the plan, further facts
    report              the module with the figures and sections of its report; or methods of these names
    Result              what the function returns and the terminal prints

A new stage is one such class and one line in `mismatch/stages/__init__.py`. No torch in this file.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import pandas as pd

from mismatch.config import RunConfig
from mismatch.report.words import text_lines
from mismatch.runs.folder import Run

if TYPE_CHECKING:
    from mismatch.report.figures import ReportFigure
    from mismatch.report.sections import Section
    from mismatch.stages.opening import Opened

C = TypeVar("C", bound=RunConfig)
P = TypeVar("P")

SEVERITIES = ("info", "low", "medium", "high")


@dataclass(frozen=True)
class Finding:
    """One thing that a run shows. `evidence` holds the numbers, by name; `next` is a command or None."""

    severity: str
    title: str
    text: str
    evidence: dict[str, float | str] = field(default_factory=dict)
    next: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For findings.json."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """What the work of a stage found.

    Attributes:
        rows: of the long table, without run id.
        plan: what was changed or chosen, a dataclass or a mapping: becomes plan.json.
        facts: further entries of the manifest.
        seconds: what the parts of the work took, by name.
        memory: what only lives in this process: further fields of the stage's Result.
    """

    rows: Sequence[Mapping[str, Any]]
    plan: Any
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One finished run, in memory or in a run folder."""

    run: Run

    @property
    def table(self) -> pd.DataFrame:
        """The long table: one number a row (see `mismatch.runs.table`)."""
        return self.run.table

    @property
    def plan(self) -> Any:
        """What was replaced or chosen (plan.json), as the plan class of the stage."""
        return self.run.plan

    @property
    def findings(self) -> list[Finding]:
        """What the run shows, in words, worst first."""
        known = [field.name for field in fields(Finding)]
        return [
            Finding(**{name: found[name] for name in known if name in found})
            for found in self.run.findings
        ]

    @property
    def run_dir(self) -> Path | None:
        """The run folder; None when nothing was written."""
        return self.run.path

    def summary(self) -> str:
        """What the command prints at its end: the texts behind the numbers, then what the stage says."""
        texts = [f"text    {line}" for line in text_lines(self.run)]
        return "\n".join([*texts, "", self.words()] if texts else [self.words()])

    def words(self) -> str:
        """What the stage says of its numbers."""
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """What the command prints with --json."""
        return {
            "run": None if self.run_dir is None else str(self.run_dir),
            "texts": self.run.manifest.get("texts", {}),
        }

    def __repr__(self) -> str:
        where = "" if self.run_dir is None else f", {self.run_dir}"
        return f"{type(self).__name__}({self.run.run_id}, {len(self.table)} numbers{where})"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"


class Stage(Generic[C, P]):
    """One command. The attributes are literals: they are read without importing the stage.

    Attributes:
        help: what the command does, in one sentence.
        examples: command lines for the help.
        report: "module" with `figures(run)` and `sections(run)`; read without importing the stage.
        plan: "module:Class" of its plan, a dataclass in a file without torch; None: a dict.
        subject: the setting that the function takes as its second argument.
        student: whether a student will do for it.
        resumable: whether a stopped run goes on from its state.
        distributed: whether the work is shared among the processes that torchrun starts.
        starts_from: kinds of runs whose settings it takes over when one is named.
        takes: which of their settings.
        run_setting: the setting that names that run; None: it is not kept.
    """

    Config: type[C]
    Result: type[Any]
    help: ClassVar[str]
    examples: ClassVar[tuple[str, ...]] = ()
    report: ClassVar[str | None] = None
    plan: ClassVar[str | None] = None
    subject: ClassVar[str] = "swap"
    student: ClassVar[bool] = True
    resumable: ClassVar[bool] = False
    distributed: ClassVar[bool] = False
    starts_from: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()
    run_setting: ClassVar[str | None] = None

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, config: C, *, overwrite: bool = False) -> None:
        """Further refusals that need the settings alone: runs that they name, further folders that will be written."""

    def prepare(self, opened: Opened[C]) -> P:
        """Everything that can be refused, before weights are loaded: swap, text, inputs of probes.

        Args:
            opened: config, tokenizer, model without weights, texts.

        Returns:
            What `run` needs of it.

        Raises:
            MismatchError: whatever this stage refuses.
        """
        raise NotImplementedError

    def announce(self, opened: Opened[C], prepared: P) -> str:
        """What a person reads on stderr before the weights are loaded."""
        return f"model   {opened.config.model} ({opened.config.dtype})"

    def loaded(self, opened: Opened[C], prepared: P) -> None:
        """Refusals that need the weights: whether an earlier run is of this very model. Nothing is written yet."""

    def run(self, opened: Opened[C], prepared: P) -> Outcome | None:
        """The work.

        Args:
            opened: now with the teacher.
            prepared: from `prepare`.

        Returns:
            What was found; under torchrun on the first rank, None on the others.

        Raises:
            KeyboardInterrupt: stopped where it can go on, or anywhere when the stage is not resumable.
            MismatchError: what else can go wrong.
        """
        raise NotImplementedError

    def findings(
        self, opened: Opened[C], outcome: Outcome, table: pd.DataFrame
    ) -> Sequence[Finding]:
        """What the numbers show, in words, worst first."""
        return ()

    def exit_code(self, config: C, result: Any) -> int:
        """Of the command, when the run is done: see `mismatch.errors`."""
        return 0

    def figures(self, run: Run) -> tuple[ReportFigure, ...]:
        """The figures of the report, in order; where there is no module `report`."""
        return ()

    def sections(self, run: Run) -> list[Section]:
        """The text and tables of the report, in order; where there is no module `report`."""
        return []
