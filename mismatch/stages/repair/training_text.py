"""What a repair learns from: calibration text, and what the original writes itself; written once, and kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mismatch.runs.state import State
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.self_generated import Writer
from mismatch.surgery.students import Teacher
from mismatch.texts.overlap import repeats
from mismatch.texts.windows import Windows

SHARE = 0.4  # of the time there is, that writing may take


@dataclass(frozen=True)
class Learnt:
    """Windows to learn from.

    Attributes:
        windows: calibration text first, then what was written; the latter is one document.
        read, written: tokens of each.
        repeated: tokens that were written and left out, for they stand in held-out text.
        seconds: that writing took.
    """

    windows: Windows
    read: int
    written: int = 0
    repeated: int = 0
    seconds: float = 0.0

    def lines(self, source: str) -> list[str]:
        """For the reader of a report; `source` is the calibration text."""
        if not self.written:
            return [f"learnt from {self.read:,} tokens of {source}"]
        lines = [
            f"learnt from {self.read:,} tokens of {source} and {self.written:,} that the original wrote itself in "
            f"{self.seconds:.0f} s"
        ]
        if self.repeated:
            lines.append(f"{self.repeated:,} more repeated held-out text and were left out")
        return lines


def learn_from(
    config: RepairConfig,
    teacher: Teacher,
    read: Windows,
    held_out: Sequence[Windows],
    *,
    state: State | None,
    stopping: Callable[[], bool],
    say: Callable[[str], None],
) -> Learnt:
    """The calibration text, with what the teacher writes behind it.

    Args:
        config: how much is written, and in what time.
        teacher: writes.
        read: the calibration text.
        held_out: what must not be learnt.
        state: where what is written is kept; None keeps nothing.
        stopping: True asks to stop.
        say: a line for the user.

    Raises:
        KeyboardInterrupt: stopped; what was begun is written again.
        MismatchError: no memory to write.
    """
    if not config.to_generate:
        return Learnt(read, read.tokens)
    prints = {
        "model": teacher.info.sha256,
        "written": [config.to_generate, config.seq_len, config.seed],
        "minutes": config.max_minutes,
    }
    kept = None if state is None else state.load(prints)
    if kept is None:
        started = time.monotonic()
        writer = Writer(
            teacher.model,
            teacher.tokenizer,
            config.seq_len,
            seed=config.seed,
            stopping=stopping,
            say=say,
        )
        limit = float("inf") if config.max_minutes is None else SHARE * 60 * config.max_minutes
        ids, seconds = writer.write(config.to_generate, limit), time.monotonic() - started
        if state is not None:
            state.save({"ids": ids}, {"seconds": seconds}, prints)
    else:
        ids, seconds = kept[0]["ids"], kept[1]["seconds"]
    if not len(ids):
        return Learnt(read, read.tokens, seconds=seconds)
    own = replace(
        read,
        ids=ids,
        doc=np.zeros(len(ids), np.int64),
        names=("written by the original",),
        asked=config.to_generate,
    )
    known = np.any([repeats(own, windows) for windows in held_out], axis=0)
    ids = ids[~known]
    both = replace(
        read,
        ids=np.concatenate([read.ids, ids]),
        doc=np.concatenate([read.doc, np.full(len(ids), read.n_docs)]),
        names=(*read.names, *own.names),
        asked=read.asked + own.asked,
    )
    return Learnt(both, read.tokens, ids.size, int(known.sum()) * config.seq_len, seconds)
