"""What the files of a run folder hold, as types: a file that does not fit is an error that names the field. No torch.

Only fields that something reads have a type here; what else is in a file is kept as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Required, TypedDict

from mismatch import registry
from mismatch.errors import RunError
from mismatch.reading import json_of, typed, yaml_of
from mismatch.runs import table as tables

MANIFEST = "manifest.json"
STATUSES = ("running", "done", "failed", "interrupted")


class TextEntry(TypedDict, total=False):
    """A text in its role."""

    source: str
    documents: int
    windows: int
    tokens: Required[int]
    fingerprint: Required[str]
    digests: list[str]


class ChosenOnEntry(TypedDict):
    """The runs before this one: the documents that they chose, calibrated or trained on."""

    run: str
    digests: list[str]


class ModelEntry(TypedDict, total=False):
    """The teacher."""

    name: str
    path: str
    sha256: str
    parameters: int
    dtype: str
    note: str


class Manifest(TypedDict, total=False):
    """manifest.json."""

    run_id: Required[str]
    status: Required[Literal["running", "done", "failed", "interrupted"]]
    schema_version: int
    kind: str
    resumable: bool
    resumed: int
    command: str
    model: str
    swap: str
    versions: dict[str, str]
    model_info: ModelEntry
    texts: dict[str, TextEntry]
    chosen_on: ChosenOnEntry
    fingerprints: dict[str, str]
    batch_size: int
    out_of_memory: list[str]


class FindingEntry(TypedDict, total=False):
    """One entry of findings.json."""

    severity: Required[Literal["info", "low", "medium", "high"]]
    title: Required[str]
    text: Required[str]
    evidence: dict[str, float | str]
    next: str | None


class MetricEntry(TypedDict, total=False):
    """What metrics.json says of one metric."""

    summary: str
    text: str
    unit: str
    range: str
    better: str
    headline: str
    blind: str
    source: str
    null: dict[str, float]


class Dictionary(TypedDict, total=False):
    """metrics.json."""

    metrics: dict[str, MetricEntry]


class Settings(TypedDict, total=False):
    """config.yaml, where the class of its command is not asked for."""

    model: str
    swap: list[str] | str
    student: str | None


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a run.

    Raises:
        RunError: there is none, it does not fit, or it was made by another version or by no command.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise RunError(
            f"there is no run in {folder}: {MANIFEST} is missing",
            hint="give the path of a folder that `mismatch trace` or another command made",
        )
    found = json_of(path, RunError)
    if not isinstance(found, dict) or not {"run_id", "status"} <= found.keys():
        raise RunError(f"{path} is not the manifest of a run")
    if (schema := found.get("schema_version")) != tables.SCHEMA_VERSION:
        versions = found.get("versions")
        by = versions.get("mismatch") if isinstance(versions, dict) else None
        raise RunError(
            f"the run in {folder} was made by mismatch {by or 'of an unknown version'!s:.40} (schema {schema!s:.40}); "
            f"this version reads schema {tables.SCHEMA_VERSION}",
            hint=f"make it again, or read it with that version; it was made by: {found.get('command')!s:.1000}",
        )
    manifest: dict[str, Any] = {"kind": "trace"} | typed(Manifest, found, _unfit(path))
    if manifest["kind"] not in registry.stages():
        raise RunError(
            f"{path}: `kind` must be one of {', '.join(registry.stages().names())}, got {manifest['kind']!r:.80}"
        )
    return manifest


def read_entry(path: Path, kind: Any, default: Any) -> Any:
    """A file of a run folder, of a type; the default where it is absent.

    Raises:
        RunError: it cannot be read, or does not fit.
    """
    if not path.exists():
        return default
    found = yaml_of(path, RunError) if path.suffix == ".yaml" else json_of(path, RunError)
    return typed(kind, found, _unfit(path))


def _unfit(path: Path) -> Callable[[str], RunError]:
    return lambda reason: RunError(
        f"{path}: {reason}",
        hint="the file was changed by hand, or made by another version of mismatch",
    )
