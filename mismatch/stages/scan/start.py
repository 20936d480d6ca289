"""How a scan begins: from Python with what is there already, or as a command with everything still to load."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mismatch.errors import UsageError
from mismatch.runs.folder import RunFolder, check_output
from mismatch.runs.ranks import Ranks, joined
from mismatch.stages.checking import check_settings
from mismatch.stages.opening import as_loaded, load, load_options, named, tokenizer_of
from mismatch.stages.scan.cells import skeleton_of
from mismatch.stages.scan.config import ScanConfig
from mismatch.stages.scan.prepared import Prepared, prepare
from mismatch.stages.scan.result import Scanned
from mismatch.stages.scan.stage import ScanJob
from mismatch.stages.trace.stage import settings as all_settings
from mismatch.surgery import loading as checkpoint


def scan(
    model: Any,
    swap: str | list[str] | tuple[str, ...],
    *,
    data: Any = "wiki",
    calibration: Any = "sotu",
    progress: bool = False,
    **settings: Any,
) -> Scanned:
    """Put every mechanism into every layer, one layer at a time, and measure what each costs.

    Args:
        model: the teacher, or what `load` takes.
        swap: mechanisms without a target, such as "infini(segment=64); zero".
        data: held-out text: a fetched name, a path, or a list of strings.
        calibration: text for mechanisms that set themselves from it; never overlaps with `data`.
        progress: show a bar on stderr.
        settings: fields of `mismatch.stages.scan.config.ScanConfig`: layers, tasks, tokens, output ...

    Returns:
        The scan. A run folder is written only when `output` or `run_name` is given.

    Raises:
        MismatchError: see `mismatch.errors`.
    """
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    config = ScanConfig(
        **named(model, data, calibration),
        swap=(swap,) if isinstance(swap, str) else tuple(swap),
        **given,
    )
    if config.folder is not None:
        check_output(config.folder)
    if isinstance(model, (str, Path)):
        prepared = _prepared(config, data, calibration)
        teacher = load(model, **load_options(config, Ranks()))
    else:
        teacher = load(model)
        config = as_loaded(config, teacher)
        skeleton = skeleton_of(teacher.layout)
        prepared = prepare(config, skeleton, teacher.tokenizer, data, calibration)
    folder = None if config.folder is None else create(config)
    path = None if folder is None else folder.path
    return ScanJob(config, teacher, prepared, folder, path, progress=progress).run()


def scan_command(
    config: ScanConfig,
    *,
    resume: Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Scanned:
    """What `mismatch scan` does. Everything that can be refused is refused before weights are loaded.

    Args:
        config: the settings.
        resume: the folder of an unfinished scan to go on with.
        overwrite: replace the run in `config.output`.
        progress: talk on stderr.

    Raises:
        MismatchError: see `mismatch.errors`.
        KeyboardInterrupt: with `.run_dir` when the scan can be resumed.
    """
    with joined(config.device) as ranks:
        if resume is not None:
            check_settings(resume, config)
        elif ranks.first and (target := config.folder) is not None:
            check_output(target, overwrite=overwrite)
        prepared = _prepared(config, config.data, config.calibration)
        if len(prepared.cells) < ranks.world:
            raise UsageError(
                f"{ranks.world} processes for {len(prepared.cells)} cells: some would have none",
                hint="start fewer, or scan more layers",
            )
        if progress and ranks.first:
            print(prepared.text(config), file=sys.stderr)
        teacher = load(config.model, **load_options(config, ranks))
        folder = None
        if ranks.first:
            folder = RunFolder.resume(resume) if resume is not None else create(config, overwrite)
        path = ranks.from_first(None if folder is None else folder.path)
        return ScanJob(config, teacher, prepared, folder, path, ranks, progress).run()


def create(config: ScanConfig, overwrite: bool = False) -> RunFolder:
    """The run folder of a scan."""
    return RunFolder.create(
        config.model,
        config.swap_text,
        all_settings(config),
        kind="scan",
        output=config.folder,
        overwrite=overwrite,
    )


def _prepared(config: ScanConfig, data: Any, calibration: Any) -> Prepared:
    skeleton = checkpoint.skeleton(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    return prepare(config, skeleton, tokenizer_of(config), data, calibration)
