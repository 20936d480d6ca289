"""Who speaks, and on which stream."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from mismatch.errors import MismatchError


def first_rank() -> bool:
    """Whether this process speaks for all: it is alone, or the first that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Under torchrun every process runs the command: the results of all but the first go nowhere."""
    if first_rank():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def say(text: str) -> None:
    """One message on stderr."""
    if first_rank():
        print(text, file=sys.stderr)


def complain(error: MismatchError) -> None:
    """`error: ...` on stderr, red where colour is wanted."""
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    say(f"\x1b[1;31merror:\x1b[0m {error}" if colour else f"error: {error}")
