"""The part of an opened command that knows how many windows fit into memory (`mismatch.runs.batch_size`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Generic, TypeVar

from mismatch.runs.batch_size import BatchSize
from mismatch.runs.folder import RunFolder
from mismatch.runs.ranks import Ranks
from mismatch.stages.base import C

Found = TypeVar("Found")


class Fitting(Generic[C]):
    """What `mismatch.stages.opening.Opened` has of it."""

    config: C
    ranks: Ranks
    folder: RunFolder | None

    @cached_property
    def batch(self) -> BatchSize:
        """Windows per forward pass, as many as there is room for."""
        return BatchSize(self.config.batch_size, self.ranks, self._halved)

    def fitting(self, work: Callable[[C], Found], what: str) -> Found:
        """A piece of the work, with as many windows a batch as fit.

        Args:
            work: is given the settings with that batch size. It begins anew at each call, and waits for other ranks by
                `Ranks.everywhere` alone.
            what: it is, behind "out of memory in the middle".

        Raises:
            MismatchError: a single window does not fit.
        """

        def with_rows(rows: int) -> Found:
            same = rows == self.config.batch_size
            return work(self.config if same else dataclasses.replace(self.config, batch_size=rows))

        return self.batch.run(with_rows, what)

    def say(self, line: str) -> None:
        """One line for the person who waits, and for log.txt."""
        raise NotImplementedError

    def _halved(self, line: str) -> None:
        self.say(line)
        if self.folder is not None:  # a run that is resumed begins with it
            self.folder.update(**self.batch.facts())
