"""Out of memory halves the batch: the one rule of all stages.

    found = batch.run(lambda rows: measure(..., batch_size=rows), "of the trace")

A piece of work that does not fit is done again from its start with half the windows, so its numbers are those of the
smaller batch; later pieces begin with it. Several ranks agree: a rank that is out of memory says so in its next
exchange with the others (`Ranks.everywhere`), and all of them begin the piece again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

from mismatch.errors import MismatchError
from mismatch.runs.ranks import ALONE, NoRoom, Ranks

WORDS = (
    "out of memory",  # CUDA, MPS
    "can't allocate memory",  # the CPU of Linux and macOS
    "not enough memory",  # the CPU of Windows
    "Cannot allocate memory",  # a file that cannot be mapped
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What a RuntimeError of torch says when memory is short and it has no class for that."""

Found = TypeVar("Found")


class BatchSize:
    """Windows per forward pass, as many as there is room for.

    Args:
        rows: that are asked for.
        ranks: who must agree.
        say: a line for the user.

    Attributes:
        rows: that run together now.
        notes: what was halved, for the manifest.
    """

    def __init__(
        self,
        rows: int,
        ranks: Ranks = ALONE,
        say: Callable[[str], None] = lambda _line: None,
        notes: list[str] | None = None,
    ) -> None:
        self.rows, self.ranks, self.say = rows, ranks, say
        self.notes: list[str] = [] if notes is None else notes

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        halved = {"out_of_memory": list(self.notes)} if self.notes else {}
        return {"batch_size": self.rows, **halved}

    def resume(self, facts: Mapping[str, Any]) -> None:
        """Begin as an earlier process left it."""
        self.rows = facts.get("batch_size", self.rows)
        self.notes += facts.get("out_of_memory", [])

    def beside(self, rows: int) -> BatchSize:
        """Another number of rows, for inputs of another kind; the notes are shared."""
        return BatchSize(rows, self.ranks, self.say, self.notes)

    def run(self, work: Callable[[int], Found], what: str) -> Found:
        """A piece of work, with as many windows a batch as fit; on several ranks, on all of them.

        Args:
            work: is given the windows a batch. It begins anew at each call, and waits for other ranks by
                `Ranks.everywhere` alone.
            what: it is, behind "out of memory in the middle".

        Returns:
            What `work` gave.

        Raises:
            MismatchError: a single window does not fit.
        """
        while True:
            try:
                found = work(self.rows)
                self.ranks.everywhere(None)  # a rank that failed behind its last exchange
                return found
            except NoRoom:
                pass
            except (MemoryError, RuntimeError) as error:
                if not is_memory(error):
                    raise
                with suppress(NoRoom):
                    self.ranks.everywhere(NoRoom())
            if self.rows == 1:
                raise no_room(what)
            release()
            self.rows //= 2
            line = f"out of memory {what}: {self.rows} windows a batch from here on"
            self.notes.append(line)
            self.say(line)


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def release() -> None:
    """Let go of what a failed piece held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def no_room(
    what: str, cheaper: str = "--device-map auto, which leaves weights in host memory or on disk"
) -> MismatchError:
    """Nothing is left to halve.

    Args:
        what: did not fit, behind "out of memory in the middle".
        cheaper: what else would help.
    """
    return MismatchError(
        f"out of memory {what}, with one window a batch",
        hint=f"take a smaller --seq-len (for prompts, --lengths or --length), --dtype bfloat16, or {cheaper}",
    )


@contextmanager
def in_words(what: str) -> Iterator[None]:
    """Memory that is short where no batch can be halved, in words.

    Raises:
        MismatchError: it is.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        raise MismatchError(
            f"out of memory {what}: {next(iter(str(error).splitlines()), '') or type(error).__name__}",
            hint="take a smaller --batch-size, a smaller --seq-len, --dtype bfloat16, or --device-map auto",
        ) from error
