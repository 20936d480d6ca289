"""Does held-out text occur in the text that is learnt from? Compared by tokens, so names and cuts do not matter.

Documents that are the same are found by their hash (`mismatch.texts.documents`). A document that was cut in
another way, or stands
inside a larger file, has another hash; its tokens are the same. `RUN` tokens in a row that stand in both are no
accident: in text of different authors the longest common runs are phrases of a dozen tokens.
"""

from __future__ import annotations

import numpy as np

from mismatch.errors import DataError
from mismatch.texts.windows import Windows

RUN = 64
_BASE = np.uint64(1_000_003)


def assert_apart(train: Windows, held: Windows, what: str) -> None:
    """Refuse a held-out window that shares `RUN` tokens in a row with a window to learn from.

    Args:
        train: to learn from.
        held: to judge on, or to look at.
        what: what `held` is for, in words.

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
    place = np.argwhere(known == found[row, column])[0][0]
    raise DataError(
        f"{run} tokens in a row of the document {held.names[held.doc[row]]}, {what}, stand in "
        f"{train.names[train.doc[place]]} too, which is learnt from",
        hint="judge on text that is not in the calibration text: --data, --calibration",
    )


def repeats(train: Windows, held: Windows) -> np.ndarray:
    """bool `windows`: whether a window to learn from has `RUN` tokens in a row of a held-out one."""
    run = _run(train)
    return np.isin(_hashes(train, run), _hashes(held, run)).any(axis=1)


def _run(train: Windows) -> int:
    return min(RUN, train.seq_len - len(train.prefix))


def _hashes(cut: Windows, run: int) -> np.ndarray:
    """uint64 `windows places`: a number for every `run` tokens in a row, without the tokenizer's prefix."""
    ids = cut.ids[:, len(cut.prefix) :].astype(np.uint64) + np.uint64(1)
    places = ids.shape[1] - run + 1
    found = np.zeros((len(ids), places), np.uint64)
    for offset in range(run):
        found = found * _BASE + ids[:, offset : offset + places]
    return found
