"""How a plan begins: from Python with what is there already, or as a command with everything still to load."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from mismatch.errors import UsageError
from mismatch.runs.folder import Run, RunFolder, check_output, load_run
from mismatch.runs.ranks import Ranks
from mismatch.stages.opening import as_loaded, load, load_options, named, tokenizer_of
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.plan.result import Planned
from mismatch.stages.plan.stage import PlanJob, same_model, scan_beside
from mismatch.stages.scan.cells import skeleton_of
from mismatch.stages.scan.prepared import Prepared, prepare
from mismatch.stages.trace.stage import settings as all_settings
from mismatch.surgery import loading as checkpoint


def plan(
    model: Any,
    mechanism: str,
    *,
    data: Any = "wiki",
    calibration: Any = "sotu",
    progress: bool = False,
    **settings: Any,
) -> Planned:
    """Pick the layers that a mechanism replaces at least cost, and measure what they cost together.

    Args:
        model: the teacher, or what `load` takes.
        mechanism: without a target, such as "gated_deltanet"; of several, each layer gets the cheapest.
        data: held-out text: a fetched name, a path, or a list of strings.
        calibration: text for mechanisms that set themselves from it; never overlaps with `data`.
        progress: show bars on stderr.
        settings: fields of `mismatch.stages.plan.config.PlanConfig`: layers, budget_kl, keep_retrieval,
        method, scan ...

    Returns:
        The plan. A run folder is written only when `output` or `run_name` is given.

    Raises:
        MismatchError: see `mismatch.errors`.
    """
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    if isinstance(given.get("scan"), Path):
        given["scan"] = str(given["scan"])
    config = PlanConfig(
        **named(model, data, calibration),
        mechanism=mechanism,
        **given,
    )
    _check_output(config, False)
    scan = _scan(config)
    if isinstance(model, (str, Path)):
        prepared = _prepared(config, data, calibration)
        teacher = load(model, **load_options(config, Ranks()))
    else:
        teacher = load(model)
        config = as_loaded(config, teacher)
        prepared = prepare(
            config.scan_config(), skeleton_of(teacher.layout), teacher.tokenizer, data, calibration
        )
    same_model(scan, teacher)
    folder = None if config.folder is None else create(config)
    return PlanJob(config, teacher, prepared, scan, folder, progress=progress).run()


def plan_command(config: PlanConfig, *, overwrite: bool = False, progress: bool = True) -> Planned:
    """What `mismatch plan` does. Everything that can be refused is refused before weights are loaded.

    Args:
        config: the settings.
        overwrite: replace the run in `config.output`.
        progress: talk on stderr.

    Raises:
        MismatchError: see `mismatch.errors`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "a plan is made in one process, and torchrun started several",
            hint="spread the scan: torchrun -m mismatch scan ..., then mismatch plan --scan RUN",
        )
    _check_output(config, overwrite)
    scan = _scan(config)
    prepared = _prepared(config, config.data, config.calibration)
    if progress:
        print(_before(config, prepared, scan), file=sys.stderr)
    teacher = load(config.model, **load_options(config, Ranks()))
    same_model(scan, teacher)
    folder = create(config, overwrite)
    return PlanJob(config, teacher, prepared, scan, folder, overwrite, progress).run()


def _check_output(config: PlanConfig, overwrite: bool) -> None:
    """Whether the plan, and the scan beside it, may be written.

    Raises:
        OutputError: one of them may not.
    """
    if config.folder is not None:
        check_output(config.folder, overwrite=overwrite)
        if config.scan is None and config.method != "greedy":
            check_output(scan_beside(config.folder), overwrite=overwrite)


def create(config: PlanConfig, overwrite: bool = False) -> RunFolder:
    """The run folder of a plan."""
    count = "" if config.layers is None else f"{config.layers} layers of "
    return RunFolder.create(
        config.model,
        f"plan {count}{config.mechanism_text}",
        all_settings(config),
        kind="plan",
        output=config.folder,
        overwrite=overwrite,
    )


def _scan(config: PlanConfig) -> Run | None:
    """The finished scan that was named.

    Raises:
        RunError: no run there, or one without numbers.
    """
    return None if config.scan is None else load_run(config.scan)


def _prepared(config: PlanConfig, data: Any, calibration: Any) -> Prepared:
    skeleton = checkpoint.skeleton(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    return prepare(config.scan_config(), skeleton, tokenizer_of(config), data, calibration)


def _before(config: PlanConfig, prepared: Prepared, scan: Run | None) -> str:
    """What is said before it starts. A choice from a finished scan needs only the judgement."""
    if scan is not None:
        return f"model   {config.model} ({config.dtype})\nscan    {config.scan}, {scan.run_id}"
    text = prepared.text(config.scan_config())
    if config.method == "greedy":
        most = config.layers or len(prepared.layers)
        text += f"\ngreedy  so often as layers are taken: up to {most} times the above"
    return text
