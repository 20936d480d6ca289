"""How a diagnosis begins: from Python with what is there already, or as a command with everything still to load."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mismatch.errors import DataError, UsageError
from mismatch.report.words import plan_lines
from mismatch.runs.folder import check_output
from mismatch.runs.ranks import Ranks
from mismatch.stages.checking import Text, check_context, plan_dict, planned
from mismatch.stages.diagnose.config import WINDOWS, DiagnoseConfig
from mismatch.stages.diagnose.earlier_run import evidence_of, readings_of
from mismatch.stages.diagnose.places import places_of
from mismatch.stages.diagnose.result import Diagnosed
from mismatch.stages.diagnose.stage import DiagnoseJob, Texts
from mismatch.stages.opening import (
    as_loaded,
    check_shares,
    create,
    given,
    load,
    load_options,
    tokenizer_of,
)
from mismatch.surgery.operate import Student
from mismatch.texts.documents import calibration_and_evaluation
from mismatch.texts.windows import windows


def diagnose(
    model: Any,
    student: Student | str | Iterable[str] | None = None,
    *,
    data: Any = "wiki",
    calibration: Any = "sotu",
    progress: bool = False,
    **settings: Any,
) -> Diagnosed:
    """Why does a swap break the model? One thing at a time is corrected, and the damage that it returns is measured.

    Args:
        model: the teacher, or what `load` takes.
        student: from `swap`, or a swap text such as "layer12:infini"; or give `swap="..."`.
        data: held-out text to judge on: a fetched name, a path, or a list of strings.
        calibration: text that corrections are fitted on; never overlaps with `data`.
        progress: show a bar on stderr.
        settings: fields of `mismatch.stages.diagnose.config.DiagnoseConfig`: tokens, judged, heads, evidence,
        output ...

    Returns:
        The diagnosis: `.verdict`, `.found` (all numbers), `.figure()`. A run folder is written only when `output` or
        `run_name` is given.

    Raises:
        MismatchError: see `mismatch.errors`.
    """
    if student is not None and not isinstance(student, Student):
        settings = {"swap": student if isinstance(student, str) else tuple(student), **settings}
        student = None
    if isinstance(settings.get("evidence"), Path):
        settings = {**settings, "evidence": str(settings["evidence"])}
    config = DiagnoseConfig(**given(model, student, data, calibration, settings, "a diagnosis"))
    if config.folder is not None:
        check_output(config.folder)
    evidence = evidence_of(config)
    if isinstance(model, (str, Path)):
        places_of(planned(config)[1][0].plan)
        teacher = load(model, **load_options(config, Ranks()))
    else:
        teacher = load(model)
        config = as_loaded(config, teacher)
        check_context(teacher.model.config, config)
    check_shares(student, teacher, "diagnose")
    read = read_texts(config, data, calibration, teacher.tokenizer)
    readings = readings_of(evidence, teacher.info.sha256)
    folder = None if config.folder is None else create(config, kind="diagnose")
    return DiagnoseJob(config, teacher, read, student, readings, folder, progress).run()


def diagnose_command(
    config: DiagnoseConfig, *, overwrite: bool = False, progress: bool = True
) -> Diagnosed:
    """What `mismatch diagnose` does. Everything that can be refused is refused before weights are loaded.

    Args:
        config: the settings.
        overwrite: replace the run in `config.output`.
        progress: talk on stderr.

    Raises:
        MismatchError: see `mismatch.errors`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "a diagnosis runs in one process, and torchrun started several",
            hint="mismatch diagnose ...; a trace or a scan can be spread",
        )
    if config.folder is not None:
        check_output(config.folder, overwrite=overwrite)
    evidence = evidence_of(config)
    _, (student, *_) = planned(config)
    places_of(student.plan)
    read = read_texts(config, config.data, config.calibration, tokenizer_of(config))
    if progress:
        lines = [f"swap    {line}" for line in plan_lines(plan_dict(student.plan))]
        lines.append(
            f"text    fitted on {read.fitted.tokens:,} tokens of {config.calibration}, judged on "
            f"{read.judged.tokens:,} of {config.data}, {read.judged.n_docs} documents"
        )
        print("\n".join(lines), file=sys.stderr)
    teacher = load(config.model, **load_options(config, Ranks()))
    readings = readings_of(evidence, teacher.info.sha256)
    folder = create(config, overwrite, kind="diagnose")
    return DiagnoseJob(config, teacher, read, None, readings, folder, progress).run()


def read_texts(config: DiagnoseConfig, data: Any, calibration: Any, tokenizer: Any) -> Texts:
    """Windows to judge on, and windows of other text to fit on.

    Raises:
        DataError: text that is missing, too short, or in both; fewer documents than an interval needs.
    """
    learnt, held_out = calibration_and_evaluation(calibration, data)
    judged = windows(held_out, tokenizer, config.seq_len, config.judged, config.seed)
    if judged.n_docs < 2:
        raise DataError(
            f"{held_out.source}: the {judged.tokens} held-out tokens are of one document, and intervals are over "
            "documents",
            hint="give text of several documents, or more --judged tokens, or a shorter --seq-len",
        )
    fitted = windows(learnt, tokenizer, config.seq_len, config.tokens, config.seed)
    if len(fitted) < WINDOWS:
        raise DataError(
            f"{learnt.source}: {len(fitted)} windows of calibration text; corrections are fitted on {WINDOWS} or more",
            hint="give more calibration text, or a shorter --seq-len",
        )
    return Texts(judged, fitted, Text(held_out, learnt, judged))
