"""The record of its swaps in a checkpoint: the `mismatch` entry of config.json. No torch.

    model_type   "mismatch", so that nothing takes the folder for the plain model and leaves the swap out
    auto_map     the two classes of `modeling_mismatch.py`, for transformers with trust_remote_code=True
    mismatch     format       of this entry; another one is refused
                 version      of the mismatch that wrote it
                 model_type   transformers' own name of the family
                 base         name and fingerprint of the model that was swapped; null when it is not known
                 swaps        in order: the text with every argument written out, and the seed. A default that changes
                              later must not change what is rebuilt
                 shared       second names of tensors that are in the file once, and the first name of each

`mismatch.json`, when it is there, holds facts about these weights (such as how they were repaired) and nothing that
loading needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from mismatch.errors import ModelError
from mismatch.models.folder import read_config_file
from mismatch.reading import json_of, shown, typed
from mismatch.runs import environment

FORMAT = 1
KEY = MODEL_TYPE = "mismatch"
EXTRA = "mismatch.json"
CODE = "modeling_mismatch"
AUTO_MAP = {
    "AutoConfig": f"{CODE}.MismatchConfig",
    "AutoModelForCausalLM": f"{CODE}.MismatchForCausalLM",
}


class _SwapEntry(TypedDict):
    swap: str
    seed: int


class _BaseEntry(TypedDict):
    name: str
    sha256: str


class _Entry(TypedDict):
    format: int
    version: NotRequired[str]
    model_type: str
    base: _BaseEntry | None
    swaps: list[_SwapEntry]
    shared: dict[str, str]


@dataclass(frozen=True)
class Swap:
    """One swap: its text, and the seed of what was drawn."""

    text: str
    seed: int = 0


@dataclass(frozen=True)
class Base:
    """The model that was swapped."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Record:
    """What has to be done to a plain model to get the module tree of a swapped one.

    Attributes:
        swaps: in the order in which they were made.
        base: the plain model; None when it is not known.
        shared: second names of tensors, and their first; known only in a folder.
        model_type: of the plain model; known only in a folder.
        version: of the mismatch that wrote the folder.
    """

    swaps: tuple[Swap, ...] = ()
    base: Base | None = None
    shared: Mapping[str, str] = field(default_factory=dict)
    model_type: str = ""
    version: str = ""

    def then(self, swap: Swap) -> Record:
        """The record after one more swap."""
        return replace(self, swaps=(*self.swaps, swap))

    def entry(self) -> dict[str, Any]:
        """The `mismatch` entry of config.json."""
        return {
            "format": FORMAT,
            "version": environment.versions()["mismatch"],
            "model_type": self.model_type,
            "base": None
            if self.base is None
            else {"name": self.base.name, "sha256": self.base.sha256},
            "swaps": [{"swap": swap.text, "seed": swap.seed} for swap in self.swaps],
            "shared": dict(self.shared),
        }


def read(folder: Path) -> Record | None:
    """The record of a model folder; None when it is not a checkpoint of mismatch.

    Raises:
        ModelError: no or broken config.json; a record of another format, or broken.
    """
    return of_config(read_config_file(folder), folder)


def of_config(raw: Mapping[str, Any], where: Path | str) -> Record | None:
    """As `read`, of a config.json that was read already."""
    if raw.get("model_type") != MODEL_TYPE and KEY not in raw:
        return None
    entry = raw.get(KEY)
    if not isinstance(entry, Mapping) or "format" not in entry:
        raise _broken(where, f"config.json has no `{KEY}` entry with a format")
    if entry["format"] != FORMAT:
        raise ModelError(
            f"{where} is a checkpoint of format {shown(entry['format'])}, written by mismatch "
            f"{entry.get('version', '?')!s:.40}; this is mismatch {environment.versions()['mismatch']}, which reads "
            f"format {FORMAT}",
            hint="load it with the version that wrote it",
        )
    known: _Entry = typed(
        _Entry, entry, lambda reason: _broken(where, f"in its `{KEY}` entry {reason}")
    )
    base = known["base"]
    found = Record(
        swaps=tuple(Swap(one["swap"], one["seed"]) for one in known["swaps"]),
        base=None if base is None else Base(base["name"], base["sha256"]),
        shared=known["shared"],
        model_type=known["model_type"],
        version=known.get("version", "?"),
    )
    if not found.swaps:
        raise _broken(where, "it names no swap")
    return found


def extra(folder: Path) -> dict[str, Any]:
    """The content of mismatch.json; empty when there is none.

    Raises:
        ModelError: it cannot be read, or is not JSON.
    """
    path = folder / EXTRA
    if not path.is_file():
        return {}
    found: dict[str, Any] = typed(
        dict, json_of(path, ModelError), lambda reason: ModelError(f"{path}: {reason}")
    )
    return found


def plain(raw: Mapping[str, Any], record: Record) -> dict[str, Any]:
    """config.json of the model that was swapped: as transformers itself knows it."""
    return {key: value for key, value in raw.items() if key != KEY} | {
        "model_type": record.model_type
    }


def _broken(where: Path | str, what: str) -> ModelError:
    return ModelError(
        f"{where} is not a whole checkpoint: {what}",
        hint="give the folder that student.save() wrote, as it was written",
    )
