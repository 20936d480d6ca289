"""What a repair trains on: training text, and text sampled from the teacher; sampled once, and kept.

The teacher runs over all of it once before a layer trains. Where time is limited, sampling and that run together take
`TEXT` of it: a stage with a tenth of the text repairs, one without time does not. Reading is timed first, for text that
is sampled is also read, beside its share of training text; then a token costs, in the shares that were asked for,

    sampling + reading / self_generated      per sampled token

On a CPU a sampled token costs four times a read one, on a GPU more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mismatch.forward import hooks
from mismatch.runs.ranks import ALONE, Ranks
from mismatch.runs.state import State
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.self_generated import Writer
from mismatch.surgery.students import Teacher
from mismatch.texts.overlap import repeats
from mismatch.texts.retrieval import made_tokens
from mismatch.texts.windows import Windows

TEXT = 0.45  # of the time there is, that sampling and the teacher's run over the text may take together
READING = 0.25  # of it, that the run may take at most
LEAST_READING = 0.1  # of it, that is left for the run where sampling took longer than was planned


@dataclass(frozen=True)
class TrainingText:
    """Windows to train on.

    Attributes:
        windows: training text first, then the self-generated text; the latter is one document.
        read, generated: tokens of each; of what was read, retrieval-shaped windows too.
        repeated: tokens that were sampled and left out, for they stand in held-out text.
        seconds: that sampling took.
    """

    windows: Windows
    read: int
    generated: int = 0
    repeated: int = 0
    seconds: float = 0.0

    def lines(self, source: str) -> list[str]:
        """For the reader of a report; `source` is the training text."""
        made = made_tokens(self.windows)
        read = f"{self.read - made:,} tokens of {source}"
        read += f", {made:,} retrieval-shaped ones made of it" if made else ""
        if not self.generated:
            return [f"trained on {read}"]
        lines = [
            f"trained on {read} and {self.generated:,} sampled from the teacher in {self.seconds:.0f} s"
        ]
        if self.repeated:
            lines.append(f"{self.repeated:,} more repeated held-out text and were left out")
        return lines


def training_text(
    config: RepairConfig,
    teacher: Teacher,
    read: Windows,
    held_out: Sequence[Windows],
    *,
    reading: float,
    state: State | None,
    stopping: Callable[[], bool],
    say: Callable[[str], None],
    ranks: Ranks = ALONE,
) -> TrainingText:
    """The training text, with text sampled from the teacher behind it.

    Args:
        config: how much is sampled, and in what time.
        teacher: is sampled from.
        read: the training text.
        held_out: what must not be trained on.
        reading: seconds that the teacher takes to read a token (`reading_pace`).
        state: where the samples are kept; None keeps nothing.
        stopping: True asks to stop.
        say: a line for the user.
        ranks: who shares the sampling; the first one keeps the samples.

    Raises:
        KeyboardInterrupt: stopped; what was begun is sampled again.
        MismatchError: no memory to sample.
    """
    if not config.to_generate:
        return TrainingText(read, read.tokens)
    prints = {
        "model": teacher.info.sha256,
        "generated": [config.to_generate, config.seq_len, config.seed],
        "minutes": config.max_minutes,
    }
    state = state if ranks.first else None
    kept = ranks.from_first(None if state is None else state.load(prints))
    if kept is None:
        started = time.monotonic()
        writer = Writer(
            teacher.model,
            teacher.tokenizer,
            config.seq_len,
            seed=config.seed,
            stopping=stopping,
            say=say,
            ranks=ranks,
        )
        limit = float("inf") if config.max_minutes is None else TEXT * 60 * config.max_minutes
        ids = writer.write(config.to_generate, limit, beside=reading / config.self_generated)
        seconds = time.monotonic() - started
        if state is not None:
            state.save({"ids": ids}, {"seconds": seconds}, prints)
    else:
        ids, seconds = kept[0]["ids"], kept[1]["seconds"]
    if not len(ids):
        return TrainingText(read, read.tokens, seconds=seconds)
    own = replace(
        read,
        ids=ids,
        doc=np.zeros(len(ids), np.int64),
        offset=np.arange(len(ids)) * ids.shape[1],
        scored=np.ones(ids.shape, bool),
        names=("self-generated",),
        asked=config.to_generate,
    )
    known = np.any([repeats(own, windows) for windows in held_out], axis=0)
    own = own.part(~known)
    both = replace(
        read,
        ids=np.concatenate([read.ids, own.ids]),
        doc=np.concatenate([read.doc, read.n_docs + own.doc]),
        offset=np.concatenate([read.offset, own.offset]),
        scored=np.concatenate([read.scored, own.scored]),
        names=(*read.names, *own.names),
        asked=read.asked + own.asked,
    )
    return TrainingText(both, read.tokens, own.tokens, int(known.sum()) * config.seq_len, seconds)


@torch.no_grad()
def reading_pace(
    config: RepairConfig,
    teacher: Teacher,
    read: Windows,
    blocks: int,
    *,
    state: State | None,
    ranks: Ranks = ALONE,
) -> float:
    """Seconds that the teacher takes to read a token, before anything is sampled; 0 without a limit of time.

    Args:
        config: the time there is.
        teacher: reads; a batch is timed.
        read: the training text.
        blocks: that it runs, at most all there are.
        state: where the pace is kept, so that a resumed repair trains on the same text.
        ranks: who will share the reading; the first one's clock counts.
    """
    if config.max_minutes is None:
        return 0.0
    blocks = min(blocks, teacher.layout.n_layers)
    prints = {"text": read.fingerprint, "minutes": config.max_minutes, "blocks": blocks}
    state = state if ranks.first else None
    kept = ranks.from_first(None if state is None else state.load(prints))
    if kept is not None:
        return kept[1]["seconds"]
    ids = hooks.on_device(teacher.layout, read.ids[: config.batch_size])
    hooks.run(teacher.layout, ids, stop=blocks)  # what is made on first use is not counted
    started = time.monotonic()
    hooks.run(teacher.layout, ids, stop=blocks)
    each = ranks.from_first((time.monotonic() - started) / ids.numel() / ranks.world)
    if state is not None:
        state.save({}, {"seconds": each}, prints)
    return each


def readable(
    config: RepairConfig, found: TrainingText, reading: float, *, say: Callable[[str], None]
) -> TrainingText:
    """As much of the text as the teacher reads in the time that sampling left: of each kind the share that was asked
    for; where less was sampled, more of the training text.

    Args:
        config: the time there is; without a limit all of the text is taken.
        found: the text.
        reading: seconds that the teacher takes to read a token (`reading_pace`).
        say: a line for the user.
    """
    if config.max_minutes is None:
        return found
    there_is = 60 * config.max_minutes
    left = min(READING * there_is, max(LEAST_READING * there_is, TEXT * there_is - found.seconds))
    whole = len(found.windows.ids)
    most = max(1, int(left / reading / config.seq_len)) if reading else whole
    if most >= whole:
        return found
    own = found.generated // config.seq_len
    read = max(most - own, round(most * (1 - config.self_generated)))
    read = min(read, whole - own, most)
    chosen = np.zeros(whole, bool)
    chosen[:read] = True
    chosen[whole - own : whole - own + most - read] = True
    say(f"(the teacher reads {most:,} of {whole:,} windows to train on: for more there is no time)")
    windows = found.windows.part(chosen)
    generated = (most - read) * config.seq_len
    return replace(found, windows=windows, read=windows.tokens - generated, generated=generated)
