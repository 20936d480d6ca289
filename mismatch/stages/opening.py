"""What every command begins with: model, tokenizer, settings as a Python caller wrote them, run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mismatch import spec
from mismatch.config import C, RunConfig, SwapConfig, fields
from mismatch.errors import UsageError
from mismatch.forward.verify import prove
from mismatch.models.load import describe, load_tokenizer, read_config
from mismatch.runs.folder import RunFolder
from mismatch.runs.ranks import Ranks
from mismatch.stages.trace.stage import settings
from mismatch.surgery import loading as checkpoint
from mismatch.surgery.operate import Student, layout_of, saving
from mismatch.surgery.students import Teacher


def load(source: Any, **options: Any) -> Teacher:
    """Load a model, or take one that is loaded, and prove its layout by a probe forward.

    A checkpoint that `student.save` wrote comes back with its swap: it can be traced, generated from and swapped
    further. Its number format stays what it was saved in; plain models are loaded in float32.

    Args:
        source: a fetched name, a folder, a hub id, or `(model, tokenizer)`.
        options: as of `mismatch.surgery.loading.load`: dtype, device, device_map, revision, trust_remote_code,
            allow_pickle.

    Raises:
        ModelError: no such model, no weights, weights of a refused kind.
        LayoutError: an unknown family, or a model that does not fit its family's layout.
    """
    if isinstance(source, Teacher):
        return source
    if isinstance(source, tuple):
        model, tokenizer = source
        info = describe(model)
        model.eval()
        layout = layout_of(model)
        if not isinstance(
            model, saving.Swapped
        ):  # the layout of a swapped model was proven before the swap
            prove(layout)
        return Teacher(model, tokenizer, layout, info)
    return Teacher(*checkpoint.load(source, **options))


def load_options(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """What `load` is told by the settings of a command."""
    return {
        "dtype": config.dtype,
        "device": None if config.device_map else ranks.device(config.device),
        "device_map": config.device_map,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "allow_pickle": config.allow_pickle,
    }


def model_config_of(config: RunConfig) -> Any:
    """The model's config alone."""
    found, _ = read_config(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    return found


def tokenizer_of(config: RunConfig) -> Any:
    """The tokenizer alone: text that cannot be used is then refused before weights are loaded."""
    _, source = read_config(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    return load_tokenizer(source.folder, config.trust_remote_code)


def given(
    model: Any,
    student: Student | None,
    data: Any,
    calibration: Any,
    rest: Mapping[str, Any],
    what: str,
) -> dict[str, Any]:
    """Fields of a config from what a Python caller wrote: lists for tuples, one swap or several, or a student.

    Args:
        model, data, calibration: names, or what is there already; the config can only name it.
        student: holds the swap; None: `rest` says it.
        rest: the other fields.
        what: is called, for the error.

    Raises:
        UsageError: neither a student nor a swap, or both; a student that was undone.
    """
    if (student is None) == ("swap" not in rest):
        raise UsageError(
            f"{what} needs one student", hint='give `student`, or `swap="layer12:infini"`'
        )
    found = {k: tuple(value) if isinstance(value, list) else value for k, value in rest.items()}
    if student is not None:
        found["swap"] = _swap_of(student)
    if isinstance(found["swap"], str):
        found["swap"] = (found["swap"],)
    return {**named(model, data, calibration), **found}


def named(model: Any, data: Any, calibration: Any) -> dict[str, str]:
    """What a config says of model and texts: names or paths. What is in memory has none."""
    whole = {"model": model, "data": data, "calibration": calibration}
    nameless = {"model": "a loaded model", "data": "given texts", "calibration": "given texts"}
    return {
        name: str(value) if isinstance(value, (str, Path)) else nameless[name]
        for name, value in whole.items()
    }


def _swap_of(student: Student) -> str:
    if not student.plan.clauses:
        raise UsageError(
            "the student holds no swap any more: it was undone", hint="swap the teacher again"
        )
    return student.plan.spec


def as_loaded(config: C, teacher: Teacher) -> C:
    """The settings of a model that came loaded: its own name and number format."""
    known = teacher.info.dtype in (fields()["dtype"].choices or ())
    dtype = teacher.info.dtype if known else config.dtype
    return dataclasses.replace(config, model=teacher.info.name, dtype=dtype)


def check_shares(student: Student | None, teacher: Teacher, command: str) -> None:
    """Whether the student is the teacher's own: its embedding is the very same tensor.

    Raises:
        UsageError: it is not.
    """
    if student is None:
        return
    ours, theirs = (m.get_input_embeddings().weight for m in (teacher.model, student.model))
    if ours is not theirs:
        raise UsageError(
            "the student was not made from this teacher: they share no weights",
            hint=f"swap the teacher that you hand to {command}, and hand over both",
        )


def create(config: SwapConfig, overwrite: bool = False, *, kind: str = "trace") -> RunFolder:
    """The run folder of a command about one swap; `kind` is the command."""
    return RunFolder.create(
        config.model,
        spec.format(config.swap_spec),
        settings(config),
        kind=kind,
        output=config.folder,
        overwrite=overwrite,
    )
