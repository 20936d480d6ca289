"""The Python function of a stage: its settings as keyword arguments, typed, made from the fields of its Config."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from torch import nn

from mismatch.config import C, fields, refused
from mismatch.errors import ConfigError, UsageError
from mismatch.forward.measured import measured
from mismatch.registry import did_you_mean
from mismatch.runs.batch_size import in_words
from mismatch.runs.folder import check_output
from mismatch.stages.base import Result, Stage
from mismatch.stages.loaded import load
from mismatch.stages.opening import FIELDS, Opened
from mismatch.stages.runner import stage_of, work
from mismatch.surgery.operate import Student
from mismatch.surgery.students import Teacher
from mismatch.texts.demo.fetch import SOURCES
from mismatch.texts.documents import held

STUDENTS = (
    "a student: from `mismatch.swap`; or trained elsewhere: from `mismatch.load`, the folder of a checkpoint or of a "
    "fine-tune, a fetched name, a hub id, `(model, tokenizer)`."
)


def function(name: str) -> Callable[..., Any]:
    """The Python function of a stage: its settings are keyword arguments, with their types and defaults."""
    stage = stage_of(name)

    def call(*args: Any, **kwargs: Any) -> Result:
        opened = opened_for(stage, args, kwargs)
        config = opened.config
        if config.folder is not None:
            check_output(config.folder)
        stage.check(config)
        with in_words(f"in the {name}"), measured(*opened.models):
            opened.fit()
            prepared = stage.prepare(opened)
            started = time.monotonic()
            opened.load()
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
        subject = subject.replace(annotation=Any, default=())
    found = [inspect.Parameter("model", kind, annotation=Any), subject]
    texts = FIELDS.values()
    for setting, arg in fields(stage.Config).items():
        if setting not in ("model", stage.subject):
            found.append(
                inspect.Parameter(
                    setting,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=arg.default,
                    annotation=Any if setting in (*texts, "student") else hints[setting],
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
        text += f" Or {STUDENTS}" if setting == stage.subject and stage.student else ""
        text = f"The same by keyword: {STUDENTS}" if setting == "student" else text
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
        hint = refused(name, unknown[0]) or did_you_mean(unknown[0], signature.parameters)
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
    student = _student_in(given, stage)
    if isinstance(student, Student):
        given[stage.subject] = _swap_of(student)
    elif isinstance(student, Teacher):
        given["student"] = student.info.name
    texts = {
        name: held(given.pop(name))
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
    return Opened(config, teacher=teacher, student=student, given=texts, progress=progress)


def _as_loaded(teacher: Teacher, stage: Stage[Any, Any]) -> dict[str, str]:
    """Name and dtype of a model that came loaded."""
    known = teacher.info.dtype in (fields(stage.Config)["dtype"].choices or ())
    return {"model": teacher.info.name} | ({"dtype": teacher.info.dtype} if known else {})


def _student_in(given: dict[str, Any], stage: Stage[Any, Any]) -> Student | Teacher | None:
    """A student among the arguments: one that is in memory; one that is named goes to the setting `student`.

    Raises:
        UsageError: a student where none will do, or beside a swap.
    """
    subject = given.get(stage.subject, ())
    if not stage.student:
        if _is_model(subject) or isinstance(subject, (Student, Path)):
            raise UsageError(
                f"mismatch.{stage.name} takes mechanisms, not a student",
                hint=f'name them: mismatch.{stage.name}(model, "infini(segment=64)")',
            )
        return None
    if isinstance(subject, (Student, Path)) or _is_model(subject) or names_a_model(subject):
        if given.get("student") is not None:
            raise UsageError(
                f"mismatch.{stage.name} was given two students", hint="give one of them"
            )
        given["student"] = given.pop(stage.subject)
    student = given.pop("student", None)
    if student is None:
        return None
    if given.get(stage.subject):
        raise UsageError(
            f"mismatch.{stage.name} was given a swap and a student", hint="give one of them"
        )
    if isinstance(student, (str, Path)):
        given["student"] = str(student)
        return None
    return student if isinstance(student, Student) else load(student)


def _is_model(value: Any) -> bool:
    """A model that is in memory, alone or with its tokenizer."""
    if isinstance(value, (tuple, list)) and any(isinstance(one, nn.Module) for one in value):
        return True
    return isinstance(value, (Teacher, nn.Module))


def names_a_model(value: Any) -> bool:
    """Whether a text names a model: it is a folder, or has no colon, as every swap has, and could be a name."""
    if not isinstance(value, str):
        return False
    found = os.path.isdir(os.path.expanduser(value))
    return found or (":" not in value and ("/" in value or value in SOURCES))


def _swap_of(student: Student) -> tuple[str]:
    if not student.plan.clauses:
        raise UsageError(
            "the student holds no swap any more: it was undone", hint="swap the teacher again"
        )
    return (student.plan.spec,)
