"""Files and folders that are there whole or as they were before: temp beside it, sync, rename."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from mismatch.errors import RunError


def write_atomic(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that it is there whole, or as it was before.

    Args:
        path: the file; its folder is made.
        fill: writes the content to the open file it is given.

    Raises:
        RunError: it cannot be written (full disk, no permission).
    """

    def write(temp: Path) -> None:
        with open(temp, "wb") as file:
            fill(file)

    write_atomic_by_name(path, write)


def write_atomic_by_name(path: Path, write: Callable[[Path], Any]) -> None:
    """The same with what writes to a path: safetensors, whose other way, into bytes, is a copy in memory.

    Raises:
        RunError: it cannot be written.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with guarded("write", path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temp.touch()
            mode = temp.stat().st_mode
            write(temp)
            temp.chmod(mode)  # safetensors 0.8 lets the owner alone read what it writes
            _sync(temp)
            os.replace(temp, path)
        finally:
            with suppress(OSError):
                temp.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends, and vanishes when it fails.

    What was at `path` is removed at that moment; the caller checks first whether it may be.

    Raises:
        RunError: it cannot be written.
    """
    with guarded("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
            new, old = Path(temporary, "new"), Path(temporary, "old")
            new.mkdir()
            mode = new.stat().st_mode & 0o666
            yield new
            for file in new.rglob("*"):
                if file.is_file():
                    file.chmod(mode)  # as in write_atomic_by_name
                    _sync(file)
            if path.exists():
                path.rename(old)
            try:
                new.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        RunError: it cannot be read.
    """
    with guarded("read", path):
        return path.read_bytes()


@contextmanager
def guarded(doing: str, path: Path) -> Iterator[None]:
    """Turn an OSError, or what safetensors makes of one, into a RunError that names the file, with a hint."""
    try:
        yield
    except (OSError, SafetensorError) as cause:
        number = _errno(cause)
        hint = {
            errno.ENOSPC: "the disk is full; what was written before is intact: free some space, "
            "then go on with --resume",
            errno.EDQUOT: "the disk quota is used up; what was written before is intact: free some "
            "space, then go on with --resume",
            errno.EACCES: "no permission; give --output a folder that you may write",
            errno.EROFS: "the file system is read-only; give --output another folder",
        }.get(number)
        why = getattr(cause, "strerror", None) or (os.strerror(number) if number else cause)
        raise RunError(f"could not {doing} {path}: {why}", hint=hint) from cause


def _errno(cause: Exception) -> int:
    if isinstance(cause, OSError):
        return cause.errno or 0
    said = re.search(r"os error (\d+)", str(cause))  # safetensors has it in its words alone
    return int(said[1]) if said else 0


def json_text(data: Any) -> str:
    """JSON that every parser reads: NaN and infinity become null."""
    return (
        json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    )


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(k): _finite(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(v) for v in data]
    if hasattr(data, "item") and getattr(data, "shape", None) == ():
        return _finite(data.item())  # a numpy number
    return None if isinstance(data, float) and not math.isfinite(data) else data
