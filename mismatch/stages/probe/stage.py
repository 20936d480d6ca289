"""One run of probes as a job: inputs, swap and controls, the questions, then table, figure and summary.

What cannot be asked (a prompt longer than the context, a key that does not tokenise, too little text) is refused before
weights are loaded. A run of probes takes minutes, so it is not resumed; it writes the run folder that a trace writes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from mismatch import registry, spec
from mismatch.config import ProbeConfig, SwapConfig, TraceConfig, fields
from mismatch.errors import RunError
from mismatch.probes import PROBES, load_probe
from mismatch.probes.base import Probe, Setting, Subject, rows
from mismatch.probes.inputs import plain_tokens
from mismatch.runs import table
from mismatch.runs.folder import Run, RunFolder, load_run, run_id
from mismatch.stages.checking import plan_dict, plan_warnings, read_text
from mismatch.stages.reporting import write_html
from mismatch.stages.trace.result import Probed
from mismatch.stages.trace.stage import peak_memory, settings
from mismatch.surgery.operate import Student
from mismatch.surgery.students import Teacher, students_of
from mismatch.texts.windows import prefix_ids

LIGHT = 4
"""Samples of the probes behind a trace."""


@dataclass(frozen=True)
class Questions:
    """What will be asked, made before the model is there.

    Attributes:
        setting: shared by the probes.
        probes: by name, in the order in which they run.
        calibration: text for mechanisms that set themselves from it.
    """

    setting: Setting
    probes: dict[str, Probe]
    calibration: Any


def chosen(config: ProbeConfig) -> tuple[str, ...]:
    """The probes to run, in the order of the table; those of other packages behind them."""
    names = config.probes or registry.probes().names()
    order = list(PROBES)
    return tuple(sorted(names, key=lambda n: order.index(n) if n in order else len(order)))


def questions(
    config: ProbeConfig,
    model_config: Any,
    tokenizer: Any,
    data: Any,
    calibration: Any,
    *,
    swapped: bool = False,
) -> Questions:
    """Make the inputs of every probe.

    Args:
        config: the settings.
        model_config: of the model: vocabulary and context.
        tokenizer: of the model, or None.
        data, calibration: as `mismatch.texts.documents.read` takes them; `data` is read only if a probe needs text.
        swapped: the swap is there already.

    Raises:
        MismatchError: what cannot be asked, and text that cannot be used.
    """
    names = chosen(config)
    text, docs = np.zeros((0, config.seq_len), np.int64), np.zeros(0, np.int64)
    if any(registry.probes().card(name).facts["needs"] == "text" for name in names):
        read = read_text(config, data, calibration, tokenizer, swapped=swapped)
        text, docs, calibration = read.cut.ids, read.cut.doc, read.calibration
    setting = Setting(
        words=plain_tokens(model_config.vocab_size, tokenizer),
        text=text,
        docs=docs,
        tokenizer=tokenizer,
        opening=() if tokenizer is None else prefix_ids(tokenizer),
        bos=getattr(tokenizer, "bos_token_id", None),
        context=getattr(model_config, "max_position_embeddings", None),
        model=config.model,
        samples=config.samples,
        batch_size=config.batch_size,
        lengths=config.prompt_lengths,
        depths=config.prompt_depths,
        travel=None if config.gate_lr is None else config.gate_lr * config.gate_steps / 2,
        seed=config.seed,
    )
    return Questions(setting, {name: load_probe(name)(setting) for name in names}, calibration)


def behind(
    config: TraceConfig,
    model_config: Any,
    tokenizer: Any,
    data: Any,
    calibration: Any,
    *,
    swapped: bool = False,
) -> Callable[[Teacher, list[Student]], list[dict[str, Any]]] | None:
    """What a trace asks behind its own measurements: inputs that take seconds, not minutes; None: nothing.

    Args:
        config: of the trace; its `probes` are asked.
        model_config, tokenizer, data, calibration, swapped: as for `questions`.

    Raises:
        MismatchError: what cannot be asked.
    """
    if not config.probes:
        return None
    shared = {name: getattr(config, name) for name in fields(SwapConfig)}
    usual = fields(ProbeConfig)["seq_len"].default
    shared |= {"output": None, "run_name": None, "seq_len": max(min(config.seq_len, usual), 32)}
    own = ProbeConfig(**shared, probes=config.probes, samples=LIGHT, lengths=("256",))
    asked = questions(own, model_config, tokenizer, data, calibration, swapped=swapped)
    return lambda teacher, students: answers(asked, teacher, students)[0]


def ask(
    config: ProbeConfig,
    teacher: Teacher,
    asked: Questions,
    student: Student | None = None,
    folder: RunFolder | None = None,
    progress: bool = False,
) -> Probed:
    """Put the questions to teacher, swap and controls.

    Args:
        config: the settings.
        teacher: the untouched model.
        asked: from `questions`.
        student: a student that is there already; None swaps as the config says.
        folder: the run folder; None writes nothing.
        progress: a bar on stderr.

    Raises:
        MismatchError: what goes wrong; the run folder then says `failed`.
        KeyboardInterrupt: stopped; the run folder then says `interrupted`.
    """
    try:
        return _ask(config, teacher, asked, student, folder, progress)
    except KeyboardInterrupt:
        if folder is not None:
            folder.finish("interrupted")
        raise
    except Exception as error:
        if folder is not None:
            # On a full disk this fails too; what went wrong first is what the user must hear.
            with suppress(RunError):
                folder.finish("failed", error=str(error))
        raise


def _ask(
    config: ProbeConfig,
    teacher: Teacher,
    asked: Questions,
    student: Student | None,
    folder: RunFolder | None,
    progress: bool,
) -> Probed:
    started = time.monotonic()
    students = students_of(teacher, config, asked.calibration, student)
    plan = plan_dict(students[0].plan, plan_warnings(students[0].plan, config.seq_len))
    if folder is not None:
        folder.log(f"{', '.join(asked.probes)}; {len(students)} students")
    found, seconds = answers(asked, teacher, students, progress)
    plan["warnings"] += [text for probe in asked.probes.values() for text in probe.warnings()]
    if folder is not None:
        folder.write_plan(plan)
    facts = {
        "kind": "probe",
        "model_info": teacher.info.as_dict(),
        "dtype": str(teacher.model.dtype).removeprefix("torch."),
        "device": str(teacher.layout.embedding_device),
        "attention": teacher.model.config._attn_implementation,
        "seed": config.seed,
        "samples": config.samples,
        "seconds": {**seconds, "all": round(time.monotonic() - started, 1)},
        "peak_memory_bytes": peak_memory(),
    }
    if folder is None:
        name = run_id(config.model, spec.format(config.swap_spec), settings(config))
        frame = table.as_table([row | {"run_id": name} for row in found])
        about = {"run_id": name, "status": "done", **facts}
        return Probed(Run.in_memory(frame, about, plan, settings(config)))
    folder.write_table(found)
    folder.write_findings([])
    folder.finish("done", **facts)
    write_html(folder.path)
    folder.log("done")
    return Probed(load_run(folder.path))


def answers(
    asked: Questions, teacher: Teacher, students: Sequence[Student], progress: bool = False
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of every probe, without run id, and the seconds that each took."""
    subjects = [Subject.teacher(teacher.layout), *map(Subject.of, students)]
    swapped = {subject.name: subject.swapped for subject in subjects}
    found: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    with tqdm(asked.probes.items(), file=sys.stderr, disable=None if progress else True) as bar:
        for name, probe in bar:
            bar.set_description(name)
            begun = time.monotonic()
            found += rows(name, probe.run(subjects), swapped, asked.setting.seed)
            seconds[name] = round(time.monotonic() - begun, 1)
    return found, seconds
