"""What a user calls from Python.

teacher = mismatch.load("smollm2")
student = mismatch.swap(teacher, "layer12:infini(segment=64)")
result = mismatch.trace(teacher, student, data="wiki", tokens=8192)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mismatch import spec
from mismatch.config import ProbeConfig, TraceConfig
from mismatch.errors import UsageError
from mismatch.models import generate as generating
from mismatch.models.generate import Generated
from mismatch.report.words import plan_lines
from mismatch.runs.folder import RunFolder, check_output
from mismatch.runs.ranks import Ranks, joined
from mismatch.stages.checking import (
    Check,
    check,
    check_context,
    check_settings,
    plan_dict,
    planned,
    read_text,
)
from mismatch.stages.diagnose.result import Diagnosed
from mismatch.stages.diagnose.start import diagnose, diagnose_command
from mismatch.stages.opening import (
    as_loaded,
    check_shares,
    create,
    given,
    load,
    load_options,
    model_config_of,
    tokenizer_of,
)
from mismatch.stages.plan.result import Planned
from mismatch.stages.plan.start import plan, plan_command
from mismatch.stages.probe.stage import ask, behind, questions
from mismatch.stages.repair.result import Repaired
from mismatch.stages.repair.start import repair, repair_command
from mismatch.stages.scan.result import Scanned
from mismatch.stages.scan.start import scan, scan_command
from mismatch.stages.trace.result import Probed, Result
from mismatch.stages.trace.stage import Job
from mismatch.surgery.operate import Student, saving
from mismatch.surgery.students import Teacher, calibrated_swap

__all__ = [
    "Check",
    "Diagnosed",
    "Planned",
    "Probed",
    "Repaired",
    "Result",
    "Scanned",
    "Student",
    "Teacher",
    "check",
    "diagnose",
    "diagnose_command",
    "generate",
    "load",
    "open_nnsight",
    "plan",
    "plan_command",
    "probe",
    "probe_command",
    "repair",
    "repair_command",
    "save_checkpoint",
    "scan",
    "scan_command",
    "swap",
    "trace",
    "trace_command",
]


def save_checkpoint(
    student: Student | Teacher,
    path: str | Path,
    *,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a swapped model as an ordinary Hugging Face folder. Same as `student.save`.

    `mismatch.load(path)` reads it, and so does `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`
    where mismatch is installed. The logits are then the same to the bit, under the same attention implementation.

    Args:
        student: from `swap`, or a checkpoint that was loaded.
        path: the folder to make.
        extra: what should be known about these weights, such as how they were trained; becomes mismatch.json.
        overwrite: replace a checkpoint that is there; nothing else is ever replaced.

    Raises:
        SurgeryError: nothing is swapped.
        OutputError: the folder exists and is not empty.
        RunError: it cannot be written.
    """
    if isinstance(student, Student):
        return student.save(path, extra=extra, overwrite=overwrite)
    return saving.save(
        student.model, path, tokenizer=student.tokenizer, extra=extra, overwrite=overwrite
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


def generate(
    model: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    **options: Any,
) -> Generated:
    """Let a model, a student or a checkpoint continue a text: `.text` is the prompt and what follows.

    Args:
        model: a student, a teacher, or what `load` takes.
        prompt: the text; with `chat` a message, and `.text` is the answer alone.
        max_new_tokens: where it stops at the latest.
        temperature: 0 takes the likeliest token each time.
        seed: of the draws.
        chat: put the prompt into the tokenizer's chat template.
        options: as of `load`.

    Raises:
        UsageError: numbers out of range, an empty prompt, a text longer than the model's context, no chat template.
        ModelError: as `load`.
    """
    generating.check(max_new_tokens, temperature)
    speaker = model if isinstance(model, Student) else load(model, **options)
    return generating.generate(
        speaker.model,
        speaker.tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
    )


def open_nnsight(student: Student | Teacher) -> Any:
    """The (swapped) model as a ready nnsight model: `with nn.trace("text"): h = nn.model.layers[12].output.save()`."""
    from mismatch.forward.nnsight_backend import open_model

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
    named = isinstance(model, (str, Path))
    config = TraceConfig(**given(model, student, data, calibration, settings, "a trace"))
    if config.folder is not None:
        check_output(config.folder)
    if named:
        check(config)
        teacher = load(model, **load_options(config, Ranks()))
    else:
        teacher = load(model)
        config = as_loaded(config, teacher)
        check_context(teacher.model.config, config)
    check_shares(student, teacher, "trace")
    swapped = student is not None
    text = read_text(config, data, calibration, teacher.tokenizer, swapped=swapped)
    facts = (teacher.model.config, teacher.tokenizer)
    after = behind(config, *facts, data, calibration, swapped=swapped)
    folder = None if config.folder is None else create(config)
    path = None if folder is None else folder.path
    job = Job(config, teacher, text, student, folder, path, progress=progress, after=after)
    return job.run()


def probe(
    model: Any,
    student: Student | None = None,
    *,
    data: Any = "wiki",
    calibration: Any = "sotu",
    progress: bool = False,
    **settings: Any,
) -> Probed:
    """Ask teacher, swap and controls what ordinary text does not show: copying, retrieval, position, memory.

    Args:
        model: the teacher, or what `load` takes.
        student: from `swap`; or give `swap="..."`.
        data: held-out text, read only when a probe needs text.
        calibration: text for mechanisms and controls that set themselves from it.
        progress: show a bar on stderr.
        settings: fields of `mismatch.config.ProbeConfig`: probes, samples, lengths, depths, controls, output ...

    Returns:
        The answers. A run folder is written only when `output` or `run_name` is given.

    Raises:
        MismatchError: see `mismatch.errors`.
    """
    config = ProbeConfig(**given(model, student, data, calibration, settings, "a run of probes"))
    if config.folder is not None:
        check_output(config.folder)
    if isinstance(model, (str, Path)):
        planned(config)
        teacher = load(model, **load_options(config, Ranks()))
    else:
        teacher = load(model)
        config = as_loaded(config, teacher)
        check_context(teacher.model.config, config)
    check_shares(student, teacher, "probe")
    facts = (teacher.model.config, teacher.tokenizer)
    asked = questions(config, *facts, data, calibration, swapped=student is not None)
    folder = None if config.folder is None else create(config, kind="probe")
    return ask(config, teacher, asked, student, folder, progress)


def probe_command(config: ProbeConfig, *, overwrite: bool = False, progress: bool = True) -> Probed:
    """What `mismatch probe` does. Everything that can be refused is refused before weights are loaded.

    Args:
        config: the settings.
        overwrite: replace the run in `config.output`.
        progress: talk on stderr.

    Raises:
        MismatchError: see `mismatch.errors`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "probes run in one process, and torchrun started several",
            hint="mismatch probe ...; a trace or a scan can be spread",
        )
    if config.folder is not None:
        check_output(config.folder, overwrite=overwrite)
    skeleton, students = planned(config)
    facts = (skeleton.config, tokenizer_of(config))
    asked = questions(config, *facts, config.data, config.calibration)
    if progress:
        lines = [f"swap    {line}" for line in plan_lines(plan_dict(students[0].plan))]
        print("\n".join([*lines, f"probes  {', '.join(asked.probes)}"]), file=sys.stderr)
    teacher = load(config.model, **load_options(config, Ranks()))
    folder = create(config, overwrite, kind="probe")
    return ask(config, teacher, asked, None, folder, progress)


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
        elif ranks.first and (target := config.folder) is not None:
            check_output(target, overwrite=overwrite)
        checked = check(config)
        texts = (config.data, config.calibration)
        tokenizer = tokenizer_of(config)
        text = read_text(config, *texts, tokenizer)
        after = behind(config, model_config_of(config), tokenizer, *texts)
        if progress and ranks.first:
            print(checked.text(), file=sys.stderr)
        teacher = load(config.model, **load_options(config, ranks))
        folder = None
        if ranks.first:
            folder = RunFolder.resume(resume) if resume is not None else create(config, overwrite)
        path = ranks.from_first(None if folder is None else folder.path)
        return Job(config, teacher, text, None, folder, path, ranks, progress, after).run()
