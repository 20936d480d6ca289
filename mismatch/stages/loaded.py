"""The model that a caller names or hands over, as what everything works with: `mismatch.load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mismatch.errors import UsageError
from mismatch.forward.measured import measured
from mismatch.models.resolve import Located
from mismatch.surgery import loading
from mismatch.surgery.operate import Student
from mismatch.surgery.students import Teacher


def load(source: Any, **options: Any) -> Teacher:
    """Load a model, or take one that is loaded, and prove its layout by a probe forward.

    A checkpoint that `student.save` wrote comes back with its swap: it can be traced, generated from and swapped
    further. Its dtype stays what it was saved in; plain models are loaded in float32.

    Args:
        source: a fetched name, a folder, a hub id, or `(model, tokenizer)`.
        options: as of `mismatch.surgery.loading.load`: dtype, device, device_map, revision, trust_remote_code,
            allow_pickle.

    Raises:
        UsageError: none of these.
        ModelError: no such model, no weights, weights of a refused kind.
        LayoutError: an unknown family, or a model that does not fit its family's layout.
    """
    if isinstance(source, Teacher):
        return source
    if isinstance(source, (tuple, list)) and len(source) == 2:
        return Teacher(*loading.of_loaded(*source))
    if not isinstance(source, (str, Path, Located)):
        what = "a student" if isinstance(source, Student) else f"{type(source).__name__}"
        raise UsageError(
            f"a model is given as a name, a folder, or (model, tokenizer), got {what}",
            hint="pass (student.model, student.tokenizer)"
            if isinstance(source, Student)
            else "pass (model, tokenizer), both as transformers loads them",
        )
    with measured():
        return Teacher(*loading.load(source, **options))
