"""The Python function of a stage: its settings as keyword arguments, typed, made from the fields of its Config."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from mismatch.config import C, fields
from mismatch.errors import ConfigError, UsageError
from mismatch.registry import did_you_mean
from mismatch.runs.folder import check_output
from mismatch.stages.base import Result, Stage
from mismatch.stages.opening import FIELDS, Opened, load
from mismatch.stages.runner import stage_of, work
from mismatch.surgery.operate import Student
from mismatch.surgery.students import Teacher


def function(name: str) -> Callable[..., Any]:
    """The Python function of a stage: its settings are keyword arguments, with their types and defaults."""
    stage = stage_of(name)

    def call(*args: Any, **kwargs: Any) -> Result:
        opened = opened_for(stage, args, kwargs)
        config = opened.config
        if config.folder is not None:
            check_output(config.folder)
        stage.check(config)
        prepared = stage.prepare(opened)
        started = time.monotonic()
        opened.load()
        if opened.student is not None:
            check_shares(opened.student, opened.teacher, name)
        spent = time.monotonic() - started
        return work(stage, opened, prepared, write=config.folder is not None, spent=spent)

    call.__name__ = call.__qualname__ = name
    call.__module__ = "mismatch"
    made = signature_of(stage)
    call.__signature__ = made  # type: ignore[attr-defined]
    # Where hints are read without the signature: documentation, type checks while running.
    call.__annotations__ = {name: one.annotation for name, one in made.parameters.items()}
    call.__annotations__["return"] = made.return_annotation
    call.__doc__ = document(stage)
    return call


def signature_of(stage: Stage[Any, Any]) -> inspect.Signature:
    """model, the subject of the stage, then every setting by keyword."""
    hints = get_type_hints(stage.Config)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    subject = inspect.Parameter(stage.subject, kind, annotation=str | Sequence[str])
    if stage.student:
        subject = subject.replace(annotation=Student | str | Sequence[str])
    found = [inspect.Parameter("model", kind, annotation=Any), subject]
    texts = FIELDS.values()
    for setting, arg in fields(stage.Config).items():
        if setting not in ("model", stage.subject):
            found.append(
                inspect.Parameter(
                    setting,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=arg.default,
                    annotation=Any if setting in texts else hints[setting],
                )
            )
    progress = inspect.Parameter(
        "progress", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool
    )
    return inspect.Signature([*found, progress], return_annotation=stage.Result)


def document(stage: Stage[Any, Any]) -> str:
    lines = [
        stage.help,
        "",
        "Args:",
        "    model: the teacher, or what `mismatch.load` takes.",
    ]
    known = fields(stage.Config)
    for setting in (
        stage.subject,
        *(name for name in known if name not in ("model", stage.subject)),
    ):
        text = " ".join(known[setting].doc.split())
        text += " Or a list of strings." if setting in FIELDS.values() else ""
        text += (
            " Or a student of this teacher." if setting == stage.subject and stage.student else ""
        )
        lines.append(f"    {setting}: {text}")
    lines += [
        "    progress: talk on stderr, with a progress bar.",
        "",
        "Returns:",
        f"    {stage.Result.__name__}. A run folder is written only when `output` or `run_name` is given.",
        "",
        "Raises:",
        "    MismatchError: see `mismatch.errors`.",
    ]
    return "\n".join(lines)


def _unfit(
    name: str, error: TypeError, kwargs: Mapping[str, Any], signature: inspect.Signature
) -> UsageError:
    """Arguments that do not fit, as an error with the nearest name."""
    unknown = [key for key in kwargs if key not in signature.parameters]
    if unknown:
        hint = did_you_mean(unknown[0], signature.parameters)
        return ConfigError(f"mismatch.{name} has no setting `{unknown[0]}`", hint=hint)
    what = str(error).replace("missing a required argument:", "there is no")
    given = ", ".join(p.name for p in signature.parameters.values() if p.default is p.empty)
    return UsageError(f"mismatch.{name}: {what}", hint=f"it takes {given}, and settings by keyword")


def opened_for(stage: Stage[C, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Opened[C]:
    """A stage opened for a Python caller: with a model, a student and texts that may be there already.

    Args:
        stage: which.
        args, kwargs: as its function takes them.

    Raises:
        UsageError: arguments that the function does not have; a student where none will do, or of another teacher.
        ConfigError: a setting of a wrong type or value.
    """
    signature = signature_of(stage)
    try:
        given = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise _unfit(stage.name, error, kwargs, signature) from None
    model, progress = given.pop("model"), given.pop("progress", False)
    student = given[stage.subject] if isinstance(given[stage.subject], Student) else None
    if student is not None:
        given[stage.subject] = _swap_of(student, stage)
    texts = {
        name: given.pop(name)
        for name in FIELDS.values()
        if name in given and not isinstance(given[name], (str, Path))
    }
    teacher = None if isinstance(model, (str, Path)) else load(model)
    settings = {
        **given,
        **dict.fromkeys(texts, "given texts"),
        **({"model": str(model)} if teacher is None else _as_loaded(teacher, stage)),
    }
    config = stage.Config(**settings)
    if teacher is not None and student is not None:
        check_shares(student, teacher, stage.name)
    return Opened(config, teacher=teacher, student=student, given=texts, progress=progress)


def _as_loaded(teacher: Teacher, stage: Stage[Any, Any]) -> dict[str, str]:
    """Name and dtype of a model that came loaded."""
    known = teacher.info.dtype in (fields(stage.Config)["dtype"].choices or ())
    return {"model": teacher.info.name} | ({"dtype": teacher.info.dtype} if known else {})


def _swap_of(student: Student, stage: Stage[Any, Any]) -> tuple[str]:
    if not stage.student:
        raise UsageError(
            f"mismatch.{stage.name} takes mechanisms, not a student",
            hint=f'name them: mismatch.{stage.name}(model, "infini(segment=64)")',
        )
    if not student.plan.clauses:
        raise UsageError(
            "the student holds no swap any more: it was undone", hint="swap the teacher again"
        )
    return (student.plan.spec,)


def check_shares(student: Student, teacher: Teacher, name: str) -> None:
    """Whether the student is the teacher's own: its embedding is the very same tensor.

    Raises:
        UsageError: it is not.
    """
    ours, theirs = (m.get_input_embeddings().weight for m in (teacher.model, student.model))
    if ours is not theirs:
        raise UsageError(
            "the student was not made from this teacher: they share no weights",
            hint=f"swap the teacher that you hand to mismatch.{name}, and hand over both",
        )
