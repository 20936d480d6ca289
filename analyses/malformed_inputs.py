"""What does mismatch do with input that is broken, enormous or made to harm?

    python analyses/malformed_inputs.py                     1,000 inputs, about 10 minutes of CPU, one thread
    python analyses/malformed_inputs.py --count 100 --only config.json tokenizer

Valid input of each kind (swap text, flags, YAML, Python settings, model folder, checkpoint, run folder, state of a
stopped run, text) is spoilt in a drawn way and handed to what reads it: the command line in this process, or a public
function. Each ends in one of these:

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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from spoilt_inputs import KINDS, NASTY, SPECS, Base, Case, kind

import mismatch
from mismatch.errors import MismatchError

HERE = Path(__file__).resolve().parent.parent / "figures" / "malformed_inputs"
SECONDS, BYTES = 10, 2 * 2**30
OUTCOMES = ("refused", "taken", "unexpected", "hang", "memory", "half-written")


class Hang(BaseException):
    """The time is up."""


@kind("config.json")
def model_config(case: Case) -> None:
    model = case.copy("model")
    case.spoil_json(model / "config.json")
    if case.draw.random() < 0.7:
        case.command("check", "--swap", SPECS[0], *case.base.words, "--model", str(model))
    else:
        mismatch.load(model)


@kind("tokenizer")
def tokenizer(case: Case) -> None:
    model = case.copy("model")
    file = case.draw.choice(sorted(model.glob("tokenizer*.json")))
    case.spoil_json(file)
    mismatch.trace(
        model, "layer1:zero", data=str(case.base.text), tokens=64, seq_len=32, controls=()
    )


@kind("safetensors")
def weights(case: Case) -> None:
    model = case.copy("model")
    file = model / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if case.draw.random() < 0.3:
        case.write(file, case.spoil_bytes(data))
    else:
        spoilt = json.dumps(case.spoil(json.loads(header))).encode()
        size = case.draw.choice((len(spoilt), len(spoilt), len(spoilt), 2**63, 0, len(spoilt) + 9))
        case.write(file, size.to_bytes(8, "little") + spoilt + rest)
    mismatch.load(model)


@kind("index.json")
def index(case: Case) -> None:
    model = case.copy("sharded")
    case.spoil_json(model / "model.safetensors.index.json")
    mismatch.load(model)


@kind("checkpoint")
def checkpoint(case: Case) -> None:
    saved = case.copy("checkpoint")
    config = json.loads((saved / "config.json").read_bytes())
    if case.draw.random() < 0.7:
        config["mismatch"] = case.spoil(config["mismatch"])
        case.write(saved / "config.json", json.dumps(config))
    else:
        case.spoil_json(saved / "config.json")
    mismatch.load(saved)


@kind("weights that give inf")
def flipped(case: Case) -> None:
    model = case.copy("model")
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    value = case.draw.choice(
        (b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f")
    )  # inf, NaN, 3e38
    for _ in range(case.draw.choice((1, 20))):
        at = 8 + length + 4 * case.draw.randrange((len(data) - 8 - length) // 4)
        data[at : at + 4] = value
    case.write(file, bytes(data))
    verb = case.draw.choice(("trace", "scan", "probe", "diagnose", "plan", "repair"))
    words = {"scan": ("--swap", "nope"), "plan": ("--mechanism", "nope", "--layers", "1")}.get(
        verb, ("--swap", "layer1:zero")
    )
    small = (
        "--model",
        str(model),
        "--data",
        str(case.base.text),
        "--device",
        "cpu",
        "-q",
        "--output",
        str(case.folder / "out"),
    )
    case.command(
        verb,
        *words,
        *small,
        *("--seq-len", "32", "--config", str(case.write(case.folder / "c.yaml", SHORT[verb]))),
    )


SHORT = {
    "trace": "tokens: 64\ncontrols: none",
    "scan": "tokens: 64\ncontrols: none\namong: '0,1'\ntasks: text",
    "probe": "samples: 2\nlengths: 64\nprobes: passkey",
    "diagnose": "fit_tokens: 512\ntokens: 128\ncontrols: none",
    "plan": "tokens: 64\nselection_tokens: 64\namong: '0,1'",
    "repair": "tokens: 64\ntrain_tokens: 256\nval_tokens: 64\ntrace_tokens: 0\nstages: local\n"
    "epochs: 1\ncontrols: none\nself_generated: 0",
}
"""Settings of a small run of each command."""


@kind("run folder")
def run_folder(case: Case) -> None:
    run = case.copy(case.draw.choice(("run", "scan")))
    name = case.draw.choice(
        (
            "manifest.json",
            "manifest.json",
            "plan.json",
            "findings.json",
            "metrics.json",
            "config.yaml",
        )
    )
    if name == "config.yaml":
        case.write(run / name, yaml.safe_dump(case.spoil(yaml.safe_load((run / name).read_text()))))
    else:
        case.spoil_json(run / name)
    read_run(case, run)


@kind("metrics.parquet")
def parquet(case: Case) -> None:
    run = case.copy(case.draw.choice(("run", "scan")))
    file, draw = run / "metrics.parquet", case.draw
    if draw.random() < 0.3:
        case.write(file, case.spoil_bytes(file.read_bytes()))
    else:
        table = pq.read_table(file)
        name = draw.choice(table.column_names)
        at = table.column_names.index(name)
        if draw.random() < 0.3:
            table = table.drop_columns([name])
        else:
            plain = [v for v in NASTY if not isinstance(v, (list, dict))]
            other = draw.choice(
                (
                    [draw.choice(plain)] * len(table),
                    draw.choices(range(40_000), k=len(table)),
                    ["x:y"] * len(table),
                )
            )
            with contextlib.suppress(pa.ArrowException, OverflowError):
                kept = draw.random() < 0.7
                array = pa.array(other, table.schema.field(name).type if kept else None)
                table = table.set_column(at, table.schema.field(name) if kept else name, array)
        file.unlink()
        pq.write_table(table, file)
    read_run(case, run)


def read_run(case: Case, run: Path) -> None:
    """Hand a run folder to one of what reads it."""
    ways: tuple[Callable[[], Any], ...] = (
        lambda: case.command("report", str(run), "--output", str(case.folder / "page.html")),
        lambda: case.command(
            "compare", str(run), str(case.base.folder / "run"), "--output", str(case.folder / "page.html")
        ),
        lambda: case.command("diagnose", str(run), "--device", "cpu", "-q", "--output", "/dev/null/x"),
        lambda: case.command("trace", "--resume", str(run), "-q"),
        lambda: case.command("plan", "--mechanism", "nope; mlp:zero", "--layers", "1", "--scan", str(run), "--output",
                             "/dev/null/x",
                             "--among", "0,1", *case.base.words),
        lambda: [mismatch.load_run(run), mismatch.load_run(run).table, mismatch.load_run(run).plan],
    )  # fmt: skip
    case.draw.choices(ways, (1, 1, 2, 2, 2, 8))[0]()  # pages take seconds


@kind("text")
def text(case: Case) -> None:
    file, draw = case.folder / draw_name(case.draw), case.draw
    data = (
        case.base.text.read_bytes()[:20_000],
        b'{"text": "a b c"}\n' * 99,
        json.dumps({"text": NASTY[3]}).encode(),
    )
    harm = (
        b"\xff\xfe" + "a b".encode("utf-16-le") * 99,
        b"\x00" * 9999,
        b"[" * 99_999,
        b'{"text": 3}\n',
        b'{"text": "a"',
        b"",
    )
    case.write(file, draw.choice((*harm, case.spoil_bytes(draw.choice(data)))))
    where = draw.choice((file, file, file.parent, "x" * 5000, "a" * 300 + ".txt", "\udcff.txt"))
    case.command("check", "--swap", "layer1:zero", *case.base.words, "--data", str(where))


def draw_name(draw: random.Random) -> str:
    return draw.choice(("a.txt", "a.jsonl", "a.json", "a.TXT", "a", ".txt"))


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
