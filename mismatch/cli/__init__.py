"""The command line: one tree of commands, no logic. Results on stdout, talk on stderr.

    0    done
    1    failed
    2    wrong usage, swap or config
    3    finished, with findings at or above --fail-on
    4    NaN or infinity in an activation
    130  interrupted; the run can be resumed

Every error becomes text and an exit code here and nowhere else. Nothing heavy is imported before a command
needs it: `--help`, `list`, `explain` and a wrong swap answer at once.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence

from mismatch.cli.parser import read
from mismatch.cli.streams import complain, one_voice, say
from mismatch.errors import MismatchError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    verbose = "-v" in words or "--verbose" in words
    if argv is None:
        # nnsight turns on its debug mode when it finds these words here.
        sys.argv[1:] = [word for word in words if word not in ("-v", "--verbose")]
    try:
        args = read(words)
        with one_voice():
            code = args.handler(args)
        sys.stdout.flush()
        return code
    except MismatchError as error:
        if verbose:
            traceback.print_exc()
        complain(error)
        return error.exit_code
    except KeyboardInterrupt as stop:
        folder = getattr(stop, "run_dir", None)
        say("interrupted" if folder is None else f"interrupted; {folder} can be resumed")
        if folder is not None:
            from mismatch.runs.folder import made_by

            kind = made_by(folder) or "trace"
            say(f"\nhint: mismatch {kind} --resume {folder}")
        return 130
    except BrokenPipeError:
        # The reader of stdout is gone (`mismatch list | head`); Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as leave:  # argparse, after --help or --version
        return int(leave.code or 0)
    except Exception as error:
        _unexpected(error, verbose)
        return 1


def _unexpected(error: Exception, verbose: bool) -> None:
    """A fault of mismatch itself, or of a library. Any rank may be the only one that has it."""
    trace = "".join(traceback.format_exception(error))
    who = "" if "RANK" not in os.environ else f" (rank {os.environ['RANK']})"
    lines = str(error).strip().splitlines() or [""]
    print(f"error: unexpected {type(error).__name__}{who}: {lines[0]}", file=sys.stderr)
    if not verbose:
        try:
            with tempfile.NamedTemporaryFile(
                "w", prefix="mismatch-", suffix=".log", delete=False, encoding="utf-8"
            ) as file:
                file.write(trace)
            print(f"\nhint: the traceback is in {file.name}; -v prints it", file=sys.stderr)
            return
        except OSError:
            pass  # no room for a file: the terminal is the log
    print(trace, end="", file=sys.stderr)
