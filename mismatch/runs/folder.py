"""The run folder: what a command leaves behind. Only this file writes one.

    runs/20261123-171904_smollm2_layer12-infini_a1b2c3/
      manifest.json    status (running|done|failed|interrupted), command, versions, fingerprints,
                       seeds, dtype, device, timings, peak memory, git commit
      config.yaml      the settings, resolved: running with it repeats the run
      plan.json        what was replaced, inherited, new, dropped
      metrics.parquet  the long table (mismatch/runs/table.py)
      metrics.json     what its columns and metrics mean
      findings.json    log.txt  figures/  report.html
      checkpoint/      of a repair or a training: the model at its end
      trainer/         of a training: the checkpoints and logs of transformers' Trainer
      state/           only while the run is unfinished: what `--resume` goes on from

Every file appears whole or not at all: it is written beside its place, synced, and moved there.
The run id (model, swap, hash of the settings) holds no time and no folder, so the same command
gives the same `metrics.parquet` to the byte; the time is in the name of the folder.
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from mismatch import registry
from mismatch.errors import OutputError, RunError
from mismatch.runs import environment
from mismatch.runs import table as tables
from mismatch.runs.entries import (
    MANIFEST,
    STATUSES,
    Dictionary,
    FindingEntry,
    Settings,
    read_entry,
    read_manifest,
)
from mismatch.runs.files import guarded, json_text, read_bytes, write_atomic
from mismatch.runs.plan import as_json, from_json
from mismatch.runs.run_id import run_id
from mismatch.runs.state import State

CONTENTS = (
    MANIFEST,
    "config.yaml",
    "plan.json",
    "metrics.parquet",
    "metrics.json",
    "findings.json",
    "report.html",
    "log.txt",
    "figures",
    "checkpoint",
    "trainer",
    "state",
)
"""All that a run folder may hold; `overwrite` removes these and nothing else."""


class RunFolder:
    """A run folder that is being written. Make one with `create` or `resume`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.state = State(path / "state")

    @property
    def run_id(self) -> str:
        return str(self.manifest["run_id"])

    @classmethod
    def create(
        cls,
        model: str,
        swap: str,
        settings: Mapping[str, Any],
        *,
        kind: str,
        resumable: bool = False,
        root: Path | str = "runs",
        output: Path | str | None = None,
        overwrite: bool = False,
        command: Sequence[str] | None = None,
        now: datetime | None = None,
    ) -> RunFolder:
        """Make the folder, with its manifest (status running) and its config.yaml.

        Args:
            model: name, folder or hub id.
            swap: the swap text in canonical form.
            settings: every setting that changes a number; becomes config.yaml and the hash.
            kind: the command that makes it.
            resumable: a stopped run goes on from its state; otherwise it begins anew.
            root: where a folder is made and named, when `output` is not given.
            output: the folder itself.
            overwrite: take the place of the run in `output`.
            command: the command line; default: that of this process.

        Raises:
            OutputError: the folder exists and is not empty, or is no folder.
            RunError: it cannot be written.
        """
        started = (now or datetime.now().astimezone()).replace(microsecond=0)
        name = run_id(model, swap, settings)
        if output:
            path = Path(output)
            check_output(path, overwrite=overwrite)
            if path.exists():
                _clear(path)
            with guarded("make the folder", path):
                path.mkdir(parents=True, exist_ok=True)
        else:
            path = _new(Path(root) / f"{started:%Y%m%d-%H%M%S}_{name}")
        folder = cls(path, {})
        folder.write("config.yaml", yaml.safe_dump(_plain(settings), sort_keys=False))
        folder.update(
            schema_version=tables.SCHEMA_VERSION,
            run_id=name,
            kind=kind,
            resumable=resumable,
            status="running",
            command=shlex.join(command if command is not None else ["mismatch", *sys.argv[1:]]),
            model=model,
            swap=swap,
            started=started.isoformat(),
            versions=environment.versions(),
            platform=platform.platform(),
            git=environment.git_commit(),
        )
        return folder

    @classmethod
    def resume(cls, path: Path | str) -> RunFolder:
        """Open an unfinished run folder to go on with it.

        Raises:
            RunError: no run there.
            OutputError: that run is done.
        """
        path = Path(path)
        folder = cls(path, check_resume(path))
        folder.update(status="running", resumed=folder.manifest.get("resumed", 0) + 1)
        return folder

    def update(self, **fields: Any) -> None:
        """Add facts to the manifest and write it.

        Raises:
            RunError: it cannot be written.
        """
        self.manifest = {**self.manifest, **fields}
        self.write(MANIFEST, json_text(self.manifest))

    def write(self, name: str, data: str | bytes) -> Path:
        """Write one file of the folder, whole or not at all; text without the home folder and secrets.

        Raises:
            RunError: it cannot be written.
        """
        data = environment.private(data).encode() if isinstance(data, str) else data
        target = self.path / name
        write_atomic(target, lambda file: file.write(data))
        return target

    def write_table(self, rows: Any) -> pd.DataFrame:
        """Write metrics.parquet and metrics.json; returns the sorted table with its run_id.

        Raises:
            RunError: not a table, or it cannot be written.
        """
        frame = rows.copy() if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
        frame["run_id"] = self.run_id
        table = tables.as_table(frame)
        self.write("metrics.parquet", tables.to_parquet(table))
        self.write("metrics.json", json_text(tables.dictionary(table["metric"])))
        return table

    def write_plan(self, plan: Any) -> None:
        """Write plan.json: a dataclass, or a mapping."""
        self.write("plan.json", json_text(as_json(plan)))

    def write_findings(self, findings: Sequence[Mapping[str, Any]]) -> None:
        """Write findings.json; raises as `write`."""
        self.write("findings.json", json_text(list(findings)))

    def log(self, line: str) -> None:
        """Append one line to log.txt, with the time.

        Raises:
            RunError: it cannot be written.
        """
        path = self.path / "log.txt"
        with guarded("write", path), open(path, "a", encoding="utf-8") as file:
            line = environment.private(line)
            file.write(f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S} {line}\n")

    def finish(self, status: str, **fields: Any) -> None:
        """Set the last status. The resume state stays unless the run is done.

        Raises:
            RunError: it cannot be written.
        """
        if status not in STATUSES[1:]:
            raise ValueError(f"status `{status}`; allowed: {', '.join(STATUSES[1:])}")
        ended = datetime.now().astimezone().replace(microsecond=0)
        self.update(status=status, ended=ended.isoformat(), **fields)
        if status == "done":
            self.state.clear()


@dataclass(frozen=True)
class Run:
    """A run folder that is being read; `path` is None for a run that was not written."""

    path: Path | None
    manifest: dict[str, Any]
    raw_plan: dict[str, Any] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    dictionary: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def table(self) -> pd.DataFrame:
        """The long table.

        Raises:
            RunError: the run has none yet, or it cannot be read.
        """
        if self.path is None:
            raise RunError("this run was not written, and its table was not kept")
        return tables.from_parquet(read_bytes(self.path / "metrics.parquet"))

    @classmethod
    def in_memory(
        cls,
        table: pd.DataFrame,
        manifest: dict[str, Any],
        plan: Any,
        config: dict[str, Any],
        findings: list[dict[str, Any]],
    ) -> Run:
        """A finished run that was not written."""
        known = tables.dictionary(table["metric"])
        run = cls(None, manifest, as_json(plan), findings, config, known)
        run.__dict__["table"] = table  # what the cached property would have read
        return run

    @cached_property
    def plan(self) -> Any:
        """What was replaced or chosen: the plan class of its stage; a dict where the stage has none.

        Raises:
            RunError: plan.json does not fit.
        """
        target = registry.stages().card(self.manifest["kind"]).facts.get("plan")
        if target is None:
            return self.raw_plan
        path = None if self.path is None else self.path / "plan.json"
        return from_json(registry.load(target), self.raw_plan, path)

    @property
    def run_id(self) -> str:
        return str(self.manifest["run_id"])


def load_run(path: Path | str) -> Run:
    """Read a run folder. Needs no torch.

    Raises:
        RunError: no run there, or it stopped before it had numbers.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if not (path / "metrics.parquet").exists():
        raise RunError(
            f"the run in {path} has no numbers yet (status: {manifest['status']})",
            hint=_finished_by(path, manifest),
        )
    return Run(
        path=path,
        manifest=manifest,
        raw_plan=read_entry(path / "plan.json", dict, {}),
        findings=read_entry(path / "findings.json", list[FindingEntry], []),
        config=read_entry(path / "config.yaml", Settings, {}),
        dictionary=read_entry(path / "metrics.json", Dictionary, {}),
    )


def check_output(path: Path | str, *, overwrite: bool = False) -> None:
    """Whether a new run may be written there: to be asked before any work is done.

    Raises:
        OutputError: it exists and is not empty, or is no folder, or is not a run that may go.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, not a folder", hint="give --output another path")
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            f"the folder {path} exists and is not empty",
            hint="give --output another path, or go on with its run by --resume, "
            "or replace its run by --overwrite",
        )
    strange = sorted(p.name for p in path.iterdir() if p.name not in CONTENTS)
    if strange or not (path / MANIFEST).exists():
        found = f"it holds {strange[0]}" if strange else f"it has no {MANIFEST}"
        raise OutputError(
            f"{path} is not a run folder and is not overwritten: {found}",
            hint="give --output another path",
        )


def check_resume(path: Path | str) -> dict[str, Any]:
    """The manifest of an unfinished run: to be asked before any work is done.

    Raises:
        RunError: no run there.
        OutputError: that run is done.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest["status"] == "done":
        raise OutputError(
            f"the run in {path} is done: there is nothing to resume",
            hint=f"read it: mismatch report {path}",
        )
    return manifest


def _new(path: Path) -> Path:
    """Make this folder, or one with a number behind it: runs of one command may begin in one second."""
    made, number = path, 1
    while True:
        with guarded("make the folder", made), suppress(FileExistsError):
            made.mkdir(parents=True)
            return made
        number += 1
        made = path.with_name(f"{path.name}-{number}")


def _clear(path: Path) -> None:
    with guarded("remove the old run in", path):
        for name in CONTENTS:
            target = path / name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)


def made_by(path: Path | str) -> str | None:
    """The command that made a run, finished or not; None when there is no run.

    Raises:
        RunError: its manifest cannot be read.
    """
    path = Path(path)
    return str(read_manifest(path)["kind"]) if (path / MANIFEST).is_file() else None


def _finished_by(path: Path, manifest: Mapping[str, Any]) -> str:
    made = manifest["kind"]
    if manifest.get("resumable"):
        return f"finish it: mismatch {made} --resume {path}"
    return f"mismatch {made} begins anew; run it again with --overwrite: {manifest['command']}"


def _plain(settings: Mapping[str, Any]) -> Any:
    """Tuples to lists and paths to text, so that YAML has no Python tags in it."""
    return json.loads(json.dumps(dict(settings), default=str))
