"""The state that an unfinished run resumes from: arrays and a little JSON, in two steps.

    state/000007-000.safetensors   the arrays of the seventh save, in parts of about 64 MiB
    state/state.json               which parts count, their sha256, the run's fingerprint, the JSON

`state.json` is the commit point: until it is replaced, the last save counts, so a save that fails
half-way (full disk, kill) leaves the last one readable. The arrays come back bit-equal. Parts keep
the memory that a save needs small, however large the state is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import safetensors.numpy

from mismatch.errors import OutputError, RunError
from mismatch.reading import json_of, typed
from mismatch.runs.files import guarded, read_bytes, write_atomic, write_atomic_by_name

PART = 64 * 2**20
"""Bytes of arrays after which a part ends."""


class Part(TypedDict):
    """One file of arrays."""

    file: str
    sha256: str


class Index(TypedDict):
    """state.json."""

    count: int
    parts: list[Part]
    fingerprint: dict[str, Any]
    info: dict[str, Any]


class State:
    """The state folder of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index = folder / "state.json"

    def save(
        self,
        arrays: Mapping[str, np.ndarray],
        info: Mapping[str, Any],
        fingerprint: Mapping[str, Any],
    ) -> None:
        """Save, in place of the last save.

        Args:
            arrays: any names, shapes and numpy dtypes that safetensors knows.
            info: anything JSON; floats come back bit-equal.
            fingerprint: what must be the same for the run to be resumed (settings, model, data).

        Raises:
            RunError: it cannot be written; the last save still counts.
        """
        last = self._read_index()
        count = last["count"] + 1 if last else 1
        parts = []
        for number, part in enumerate(_parts(arrays)):
            name = f"{count:06d}-{number:03d}.safetensors"
            write_atomic_by_name(self.folder / name, partial(safetensors.numpy.save_file, part))
            with guarded("read", self.folder / name), open(self.folder / name, "rb") as file:
                parts.append(
                    {"file": name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
                )
        index = {
            "count": count,
            "parts": parts,
            "fingerprint": _json_form(fingerprint),
            "info": _json_form(info),
        }
        text = json.dumps(index, indent=2)
        write_atomic(self._index, lambda file: file.write(text.encode()))
        for old in self.folder.glob("*.safetensors"):
            if not old.name.startswith(f"{count:06d}-"):
                with guarded("remove", old):
                    old.unlink(missing_ok=True)

    def load(
        self, fingerprint: Mapping[str, Any]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The arrays and the JSON of the last save, or None if there is none.

        Raises:
            OutputError: the state is of a run with another fingerprint; names the fields that differ.
            RunError: the state is damaged.
        """
        index = self._read_index()
        if index is None:
            return None
        self._compare(index["fingerprint"], _json_form(fingerprint))
        arrays: dict[str, np.ndarray] = {}
        for part in index["parts"]:
            path = self.folder / Path(part["file"]).name
            data = read_bytes(path)
            if hashlib.sha256(data).hexdigest() != part["sha256"]:
                raise _damaged(path, "its sha256 is not the one saved")
            try:
                arrays.update(safetensors.numpy.load(data))
            except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as cause:
                raise _damaged(path, cause) from cause
        return arrays, index["info"]

    def clear(self) -> None:
        """Remove the state: the run is done."""
        if self.folder.exists():
            with guarded("remove", self.folder):
                shutil.rmtree(self.folder)

    def _read_index(self) -> Index | None:
        if not self._index.exists():
            return None
        found: Index = typed(
            Index, json_of(self._index, RunError), lambda reason: _damaged(self._index, reason)
        )
        return found

    def _compare(self, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        fields = [k for k in sorted(saved.keys() | now.keys()) if saved.get(k) != now.get(k)]
        if fields:
            lines = [f"  {k}: {saved.get(k)!r} then, {now.get(k)!r} now" for k in fields]
            raise OutputError(
                f"the run in {self.folder.parent} was started with other settings:\n"
                + "\n".join(lines),
                hint="resume it with the same settings, or give --output another path",
            )


def _damaged(path: Path, reason: object) -> RunError:
    return RunError(f"{path} is damaged: {reason}", hint="start the run again with --overwrite")


def _parts(arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    part: dict[str, np.ndarray] = {}
    size = 0
    for name, array in arrays.items():
        part[name] = np.asarray(array, order="C")  # safetensors writes the buffer, strides unread
        size += part[name].nbytes
        if size >= PART:
            yield part
            part, size = {}, 0
    if part:
        yield part


def _json_form(data: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON (tuples as lists), so that equal settings compare equal."""
    return json.loads(json.dumps(dict(data)))
