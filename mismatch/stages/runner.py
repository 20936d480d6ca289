"""What all stages do alike: one runner for all commands and functions.

refuse     settings, folder, torchrun; then whatever the stage refuses: nothing is loaded or written before that
load       the weights, then the run folder, status `running`
work       the stage; Ctrl-C and failures are written into the folder
finish     table, plan, findings, manifest, report; the stage's Result
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mismatch import registry
from mismatch.config import ELSEWHERE, C, RunConfig
from mismatch.config import load as load_config
from mismatch.errors import MismatchError, OutputError, RunError, UsageError
from mismatch.report.words import text_line
from mismatch.runs import table as tables
from mismatch.runs.batch_size import in_words
from mismatch.runs.environment import peak_memory
from mismatch.runs.folder import Run, RunFolder, check_output, check_resume, load_run
from mismatch.runs.ranks import Ranks, joined
from mismatch.runs.run_id import run_id
from mismatch.stages.base import Outcome, P, Result, Stage
from mismatch.stages.chosen_on import CHOSE
from mismatch.stages.opening import Opened
from mismatch.stages.reporting import write_html


def stage_of(name: str) -> Stage[Any, Any]:
    """The stage behind a name.

    Raises:
        UsageError: there is none.
    """
    made: Stage[Any, Any] = registry.stages().get(name)(name)
    return made


def command(
    name: str,
    config: RunConfig,
    *,
    resume: Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Result:
    """What `mismatch NAME` does, once its settings are read.

    Args:
        name: of the stage.
        config: the settings.
        resume: the folder of an unfinished run to go on with.
        overwrite: replace the run in `config.output`.
        progress: talk on stderr.

    Raises:
        MismatchError: see `mismatch.errors`. Whatever can be refused is refused before weights are loaded, and leaves
            no folder behind.
        KeyboardInterrupt: stopped; with `.run_dir` when the run can be resumed.
    """
    stage = stage_of(name)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not stage.distributed:
        raise UsageError(
            f"`mismatch {name}` runs in one process, and torchrun started several",
            hint=f"mismatch {name} ...   (without torchrun)",
        )
    with in_words(f"in the {name}"), joined(config.device) as ranks:
        opened = Opened(config, ranks=ranks, progress=progress, overwrite=overwrite)
        return run(stage, opened, resume=resume)


def run(stage: Stage[C, P], opened: Opened[C], *, resume: Path | None = None) -> Result:
    """Refuse, load, work, finish."""
    config = opened.config
    if resume is not None:
        check_settings(resume, config)
    elif opened.ranks.first and config.folder is not None:
        check_output(config.folder, overwrite=opened.overwrite)
    stage.check(config, overwrite=opened.overwrite)
    opened.ranks.everywhere(
        None
    )  # no rank makes a folder while another one looks whether it is there
    opened.fit()
    prepared = stage.prepare(opened)
    if opened.progress and opened.ranks.first:
        texts = (
            f"text    {role}: {text_line(text.as_dict())}" for role, text in opened.texts.items()
        )
        print("\n".join([stage.announce(opened, prepared), *texts]), file=sys.stderr)
    started = time.monotonic()
    opened.load()
    return work(stage, opened, prepared, resume=resume, spent=time.monotonic() - started)


def work(
    stage: Stage[C, P],
    opened: Opened[C],
    prepared: P,
    *,
    resume: Path | None = None,
    write: bool = True,
    spent: float = 0.0,
) -> Result:
    """The work of a stage and what is written of it.

    Args:
        stage: what to do.
        opened: with its weights.
        prepared: from `stage.prepare`.
        resume: the folder of an unfinished run to go on with.
        write: make a run folder; a function makes one only where its settings name it.
        spent: seconds that loading took.
    """
    ranks = opened.ranks
    stage.loaded(opened, prepared)
    if ranks.first and write:
        opened.folder = _folder(stage, opened, resume)
    opened.path = ranks.from_first(None if opened.folder is None else opened.folder.path)
    if resume is not None:
        opened.batch.resume(ranks.from_first(opened.folder and opened.folder.manifest))
    started = time.monotonic()
    try:
        with in_words(f"in the {stage.name}"):
            outcome = stage.run(opened, prepared)
        result = None
        if outcome is not None:
            seconds = {"load": spent, "work": time.monotonic() - started, **outcome.seconds}
            result = _finished(stage, opened, outcome, seconds)
        result = _everywhere(stage, ranks, result)
        if not ranks.first and opened.path is not None:
            _clear_node(opened.path)
    except KeyboardInterrupt as stop:
        if opened.folder is not None:
            opened.folder.finish("interrupted")
            if stage.resumable:
                stop.run_dir = opened.folder.path  # type: ignore[attr-defined]
        raise
    except Exception as error:
        if opened.folder is not None:
            # On a full disk this fails too; what went wrong first is what the user must hear.
            with suppress(RunError):
                opened.folder.finish("failed", error=str(error))
                opened.folder.log(f"failed: {error}")
        if isinstance(error, MismatchError) and not ranks.first:
            print(f"error (rank {ranks.rank}): {error}", file=sys.stderr)  # torchrun ends the first
        raise
    return result


def _everywhere(stage: Stage[Any, Any], ranks: Ranks, result: Result | None) -> Result:
    """The first rank's result on every rank, with its table: others may not see the folder, as on another node."""
    if ranks.world > 1 and result is not None:
        _ = result.run.table
    run = ranks.from_first(None if result is None else result.run)
    return stage.Result(run) if result is None else result


def _clear_node(path: Path) -> None:
    """Remove what the ranks of another node kept: there the folder holds a state and no run."""
    with suppress(OSError):
        if [one.name for one in path.iterdir()] == ["state"]:
            shutil.rmtree(path)


def _folder(stage: Stage[Any, Any], opened: Opened[Any], resume: Path | None) -> RunFolder:
    if resume is not None:
        return RunFolder.resume(resume)
    config = opened.config
    return RunFolder.create(
        config.model,
        config.subject,
        config.settings(),
        kind=stage.name,
        resumable=stage.resumable,
        output=config.folder,
        overwrite=opened.overwrite,
    )


def _finished(
    stage: Stage[Any, Any], opened: Opened[Any], outcome: Outcome, seconds: Mapping[str, float]
) -> Result:
    """Table, plan, findings, manifest and report: in the folder, or in memory where nothing is written."""
    config, folder = opened.config, opened.folder
    name = run_id(config.model, config.subject, config.settings())
    table = tables.as_table([{**row, "run_id": name} for row in outcome.rows])
    findings = [found.as_dict() for found in stage.findings(opened, outcome, table)]
    facts = {
        **_facts(opened),
        "seconds": {part: round(spent, 1) for part, spent in seconds.items()},
        **outcome.facts,
    }
    if folder is None:
        about = {
            "run_id": name,
            "kind": stage.name,
            "status": "done",
            "model": config.model,
            "swap": config.subject,
            **facts,
        }
        run = Run.in_memory(table, about, outcome.plan, config.settings(), findings)
        return stage.Result(run, **outcome.memory)
    folder.write_plan(outcome.plan)
    folder.write_table(table)
    folder.write_findings(findings)
    folder.finish("done", **facts)
    write_html(folder.path)
    folder.log("done")
    return stage.Result(load_run(folder.path), **outcome.memory)


def _facts(opened: Opened[Any]) -> dict[str, Any]:
    """What every manifest says of how its numbers were made."""
    teacher, student = opened.teacher, opened.student_info
    return {
        "model_info": teacher.info.as_dict(),
        **({} if student is None else {"student_info": student.as_dict()}),
        "dtype": str(teacher.model.dtype).removeprefix("torch."),
        "device": str(teacher.layout.embedding_device),
        "attention": teacher.model.config._attn_implementation,
        "seed": opened.config.seed,
        "ranks": opened.ranks.world,
        **opened.batch.facts(),
        "texts": {
            **opened.earlier,
            **{role: text.as_dict() for role, text in opened.texts.items()},
        },
        **({} if opened.chosen_on is None else {CHOSE: opened.chosen_on.as_dict()}),
        "fingerprints": opened.fingerprints(),
        "peak_memory_bytes": peak_memory(),
    }


def check_settings(path: Path, config: RunConfig) -> None:
    """Whether the unfinished run in a folder may go on with these settings.

    Raises:
        RunError: no run there.
        OutputError: that run is done, or was started with other settings; the message names them.
    """
    check_resume(path)
    trusted = {"trust_remote_code": config.trust_remote_code}
    then = load_config(type(config), path / "config.yaml", trusted).to_dict()
    now = config.to_dict()
    other = [name for name in now if name not in ELSEWHERE and then[name] != now[name]]
    if other:
        lines = [f"  {name}: {then[name]!r} then, {now[name]!r} now" for name in other]
        raise OutputError(
            f"the run in {path} was started with other settings:\n" + "\n".join(lines),
            hint="resume it with the same settings, or start a new run without --resume",
        )
