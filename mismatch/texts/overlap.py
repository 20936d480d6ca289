"""Whether held-out text occurs in the training text. Compared by tokens, so names and cuts do not matter.

Equal documents are found by their hash (`mismatch.texts.documents`). A document that was cut in another way, or is part
of a larger file, has another hash but the same tokens. A run of `RUN` tokens that occurs in both is no accident: in
texts of different authors the longest common runs are phrases of a dozen tokens.
"""

from __future__ import annotations

import numpy as np

from mismatch.errors import DataError
from mismatch.texts.windows import Windows

RUN = 64
"""Tokens in a row that count as the same text."""

_BASE = np.uint64(1_000_003)
"""Base of the polynomial hash of a run, modulo 2^64: a prime larger than any vocabulary here."""


def assert_apart(train: Windows, held: Windows, what: str) -> None:
    """Refuse held-out text that shares `RUN` tokens in a row with the training text.

    Args:
        train: training windows.
        held: evaluation or validation windows.
        what: what `held` is for, as a clause of the error: "which is evaluated on".

    Raises:
        DataError: they share a run; names the first two documents.
    """
    run = _run(train)
    known = _hashes(train, run)
    found = _hashes(held, run)
    shared = np.isin(found, known)
    if not shared.any():
        return
    row, column = np.argwhere(shared)[0]
    match = np.argwhere(known == found[row, column])[0][0]
    raise DataError(
        f"{run} tokens in a row of the document {held.names[held.doc[row]]}, {what}, also occur in "
        f"{train.names[train.doc[match]]}, which is trained on",
        hint="evaluate on text that is not in the training text: --data, --train-data",
    )


def repeats(train: Windows, held: Windows) -> np.ndarray:
    """bool `windows`: whether a training window has `RUN` tokens in a row of a held-out one."""
    run = _run(train)
    return np.any(np.isin(_hashes(train, run), _hashes(held, run)), axis=1)


def _run(train: Windows) -> int:
    return min(RUN, train.seq_len - len(train.prefix))


def _hashes(cut: Windows, run: int) -> np.ndarray:
    """uint64 `windows runs`: the hash of every `run` tokens in a row, without the tokenizer's prefix."""
    ids = cut.ids[:, len(cut.prefix) :].astype(np.uint64) + np.uint64(1)
    runs = ids.shape[1] - run + 1
    found = np.zeros((len(ids), runs), np.uint64)
    for offset in range(run):
        found = found * _BASE + ids[:, offset : offset + runs]
    return found
