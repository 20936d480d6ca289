"""What does mismatch do with input that is broken, enormous or made to harm?

    python analyses/malformed_inputs.py                     1,000 inputs, about 12 minutes of CPU, one thread
    python analyses/malformed_inputs.py --count 100 --only config.json tokenizer

Valid input of each kind (swap text, flags, YAML, Python settings, model folder, checkpoint, run folder, stopped trace
and training, text, rows, layer lists, settings of the Trainer) is spoilt in a drawn way and handed to what reads it:
the command line in this process, or a public function. Each ends in one of these:

    refused      an error of mismatch, in words
    taken        it was no harm after all, and the command went through
    unexpected   any other error
    hang         more than 10 seconds of CPU
    memory       more than 2 GB beyond what was there
    half-written a run folder that still says `running`, a temporary file, or anything at all behind a usage error

Writes figures/malformed_inputs/outcomes.csv: a row a kind of input. What was not refused or taken is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from spoilt_files import KINDS
from spoilt_inputs import Base, Case

from mismatch.errors import MismatchError

HERE = Path(__file__).resolve().parent.parent / "figures" / "malformed_inputs"
SECONDS, BYTES = 10, 2 * 2**30
OUTCOMES = ("refused", "taken", "unexpected", "hang", "memory", "half-written")


class Hang(BaseException):
    """The time is up."""


def measured(base: Base, name: str, seed: int) -> tuple[str, str]:
    """One input: its outcome, and what was said."""

    def over(*_: Any) -> None:
        raise Hang

    with tempfile.TemporaryDirectory() as temporary:
        folder, before = Path(temporary), os.getcwd()
        (folder / "work").mkdir()
        os.chdir(folder / "work")
        case = Case(base, folder, random.Random(f"{name} {seed}"))
        there = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (there + BYTES, resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, over)
        signal.signal(signal.SIGPROF, over)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(
            signal.ITIMER_REAL, 30 * SECONDS
        )  # waits for something; a busy machine is no hang
        started, outcome, said = time.process_time(), "taken", ""
        try:
            KINDS[name](case)
        except MismatchError as error:
            outcome, said = "refused", str(error)
            if error.exit_code == 2 and any((folder / "work").iterdir()):
                outcome = "half-written"
        except MemoryError as error:
            outcome, said = "memory", repr(error)
        except Hang:
            outcome = "hang"
        except BaseException as error:
            outcome, said = "unexpected", f"{type(error).__name__}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            os.chdir(before)
        if time.process_time() - started > SECONDS:
            outcome = "hang"
        if outcome in ("refused", "taken") and list(unfinished(folder)):
            outcome, said = "half-written", ", ".join(map(str, unfinished(folder)))
    return outcome, said


def unfinished(folder: Path) -> Iterator[Path]:
    """What a command must not leave behind."""
    yield from folder.rglob("*.tmp")
    for manifest in folder.rglob("manifest.json"):
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            if json.loads(manifest.read_bytes()).get("status") == "running":
                yield manifest


def outcomes(
    model: Path, count: int, seed: int, only: Sequence[str]
) -> tuple[pd.DataFrame, list[tuple[str, int, str, str]]]:
    """A row a kind of input with how often it ended how, and each that ended badly."""
    names = list(only or KINDS)
    found: dict[str, Counter[str]] = {name: Counter() for name in names}
    bad = []
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = Base(Path(temporary), model)
        for number in range(count):
            name = names[number % len(names)]
            outcome, said = measured(base, name, seed + number)
            found[name][outcome] += 1
            if outcome not in ("refused", "taken"):
                bad.append((name, seed + number, outcome, said))
                print(f"{outcome}: {name}, seed {seed + number}: {said[:600]}\n", flush=True)
    rows = [
        {"input": n, "tried": c.total(), **{o: c[o] for o in OUTCOMES}} for n, c in found.items()
    ]
    return pd.DataFrame(rows), bad


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=(), help="some kinds of input")
    args = parser.parse_args()
    from mismatch.texts.demo import fetch

    table, _ = outcomes(fetch.fetch("glassllm"), args.count, args.seed, args.only)
    print(table.to_string(index=False))
    if not args.only:
        HERE.mkdir(parents=True, exist_ok=True)
        table.to_csv(HERE / "outcomes.csv", index=False)


if __name__ == "__main__":
    main()
