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
import io
import json
import os
import random
import resource
import shutil
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

import mismatch
from mismatch import cli
from mismatch.errors import MismatchError

HERE = Path(__file__).resolve().parent.parent / "figures" / "malformed_inputs"
SECONDS, BYTES = 10, 2 * 2**30
OUTCOMES = ("refused", "taken", "unexpected", "hang", "memory", "half-written")
SMALL = ("--tokens", "64", "--seq-len", "32", "--controls", "none", "--batch-size", "2")

NASTY: tuple[Any, ...] = (
    *(None, True, "", "x", -1, 0, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), [], {}, [None], {"x": None}, [[[[]]]], [1, "a"], "1", "null", "a" * 300),
    *("a" * 100_000, "é\u2028\U0001f600", "\x1b[31m", "a\x00b", "../../etc/passwd", "~", "~nouser/x", "/dev/zero"),
    *("planted.parts:Evil", "os:system", "layer0:zero", "layers[0-999999999]:zero", "%s%n{}", "nan", "1e999"),
)  # fmt: skip
SPECS = (
    "layer1:infini(segment=16)", "layers[0-last/2].mlp:zero; final_norm:dyt", "norms:dyt",
    "layer2.attn:parallel(infini)",
    "layer1:sliding_window(window=8, sinks=1)", "layer1.heads[0,1]:nope", "all:nope", "layer1.mlp:lora(r=4)",
)  # fmt: skip
PIECES = (
    *("9" * 5000, "9" * 19, "-1", "1e30", "1e999", "nan", ";" * 50, "(" * 400, ")" * 400, "[" * 400, "layer", "last"),
    *(":", "=", ",", "/", "-", ".", "'", '"', "\\", "\t", "\n", "\x00", "\udcff", "é", "none"),
    *("true", "parallel(" * 50),
    *("layer0:zero;" * 9000, "a" * 60_000, "planted.parts:Evil", "os:system", "sys:exit", ".:x", "norms", "all"),
)  # fmt: skip
FLAGS = (
    *("--model", "--revision", "--dtype", "--device", "--device-map", "--swap", "--data", "--tokens", "--seq-len"),
    *("--calibration-data", "--calibration-tokens", "--batch-size", "--controls", "--metrics", "--moment-tokens"),
    *("--probes", "--backend", "--seed", "--output", "--run-name", "--fail-on", "--config", "--resume", "--nonsense"),
)  # fmt: skip


class Hang(BaseException):
    """The time is up."""


class Case:
    """One spoilt input: an empty folder to work in, and what draws."""

    def __init__(self, base: Base, folder: Path, draw: random.Random) -> None:
        self.base, self.folder, self.draw = base, folder, draw

    def copy(self, name: str) -> Path:
        """A copy of a folder of the base; files that are not touched are not copied."""
        target = self.folder / name
        shutil.copytree(self.base.folder / name, target, copy_function=os.link)
        return target

    def write(self, path: Path, data: bytes | str) -> Path:
        """In place of what is there; the base keeps its own."""
        path.unlink(missing_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode(errors="surrogatepass"))
        return path

    def nasty(self) -> Any:
        return self.draw.choice(NASTY)

    def spoil_bytes(self, data: bytes) -> bytes:
        """Cut, doubled, flipped, or something in between."""
        at = self.draw.randrange(max(1, len(data)))
        junk = self.draw.randbytes(self.draw.choice((1, 8, 200)))
        ways = (
            data[:at],
            data + junk,
            data[:at] + junk + data[at:],
            data[:at] + junk + data[at + len(junk) :],
            b"",
            junk,
        )
        return self.draw.choice(ways)

    def spoil(self, data: Any) -> Any:
        """One value somewhere in it is another, or is gone; rarely the whole."""
        if self.draw.random() < 0.05 or not isinstance(data, (dict, list)) or not data:
            return self.nasty()
        copy: Any = dict(data) if isinstance(data, dict) else list(data)
        key = self.draw.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        inner = copy[key]
        if isinstance(inner, (dict, list)) and inner and self.draw.random() < 0.7:
            copy[key] = self.spoil(inner)
        elif isinstance(copy, dict) and self.draw.random() < 0.2:
            del copy[key]
        else:
            copy[key] = self.nasty()
        return copy

    def spoil_json(self, path: Path) -> None:
        data = path.read_bytes()
        if (way := self.draw.random()) < 0.15:
            self.write(path, self.spoil_bytes(data))
        elif way < 0.2:
            self.write(
                path,
                self.draw.choice(
                    ("[" * 100_000, '{"a":' * 5000, "9" * 6000, "NaN", '"' + "a" * 10**7 + '"')
                ),
            )
        else:
            self.write(path, json.dumps(self.spoil(json.loads(data))))

    def command(self, *words: str) -> None:
        """The command line; what is no error of mismatch comes out as it is."""
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = cli.main(list(words))
        if "error: unexpected" in said.getvalue():
            raise RuntimeError(said.getvalue()[:400])
        if code not in (0, 3):
            raise Refused(said.getvalue(), code)


class Refused(MismatchError):
    """What the command line said no to."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.exit_code = code


class Base:
    """Valid input of every kind, made once."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.text = folder, folder / "model", folder / "text.txt"
        shutil.copytree(model, self.model)
        self.text.write_text(" ".join(f"word {n} of many." for n in range(3000)))
        self.teacher = mismatch.load(self.model)
        mismatch.swap(self.teacher, SPECS[0]).save(folder / "checkpoint")
        shutil.copytree(self.model, folder / "sharded")
        weights = (folder / "sharded" / "model.safetensors").rename(
            folder / "sharded" / "a.safetensors"
        )
        names = dict.fromkeys(self.teacher.model.state_dict(), weights.name)
        index = folder / "sharded" / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
        case = Case(self, folder, random.Random(0))
        case.command("trace", "--swap", SPECS[0], "--output", str(folder / "run"), *self.words)
        scan = ("--swap", "nope; mlp:zero", "--among", "0,1", "--output", str(folder / "scan"))
        case.command("scan", *scan, *self.words)
        # As a stopped run leaves it: the state of the last batch, and no table.
        shutil.copytree(folder / "run", folder / "stopped")
        manifest = json.loads((folder / "stopped" / "manifest.json").read_text())
        case.write(
            folder / "stopped" / "manifest.json", json.dumps(manifest | {"status": "interrupted"})
        )

    @property
    def words(self) -> tuple[str, ...]:
        """Flags of a small run."""
        return (
            "--model",
            str(self.model),
            "--data",
            str(self.text),
            "--device",
            "cpu",
            "-q",
            *SMALL,
        )


KINDS: dict[str, Callable[[Case], None]] = {}


def kind(name: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """What reads one kind of input, under its name in the table."""

    def add(function: Callable[[Case], None]) -> Callable[[Case], None]:
        KINDS[name] = function
        return function

    return add


@kind("swap text")
def swap_text(case: Case) -> None:
    text, draw = case.draw.choice(SPECS), case.draw
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, piece = draw.randrange(len(text) + 1), draw.choice(PIECES)
        text = draw.choice(
            (
                text[:at] + piece + text[at:],
                text[:at] + text[at + 1 :],
                text[:at] + piece,
                piece + text,
            )
        )
    case.command("check", "--swap", text, *case.base.words)


@kind("flags")
def flags(case: Case) -> None:
    words = [word for name in case.draw.sample(FLAGS, 2) for word in (name, str(case.nasty()))]
    verb = case.draw.choice(
        ("check", "trace", "probe", "scan", "diagnose", "repair", "plan", "report", "compare", "x")
    )
    case.command(
        verb, "--swap", SPECS[0], *case.base.words, *(word for word in words if word != "/dev/zero")
    )


@kind("YAML")
def yaml_file(case: Case) -> None:
    settings = {
        "model": str(case.base.model),
        "swap": [SPECS[0]],
        "data": str(case.base.text),
        "tokens": 64,
    }
    settings |= {
        "seq_len": 32,
        "controls": ["zero"],
        "metrics": ["kl"],
        "seed": 0,
        "device": "cpu",
        "dtype": "auto",
    }
    text = yaml.safe_dump(case.spoil(settings))
    if case.draw.random() < 0.4:
        laughs = "a0: &a0 [x, x]\n" + "".join(
            f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)
        )
        harm = (
            laughs,
            "- " * 900,
            "a: " + "[" * 5000,
            "!!python/object/apply:os.system [ls]",
            "seed: 064",
            "seed: 1e3",
        )
        text = case.draw.choice(
            (
                *harm,
                "? [a]\n: b",
                "%YAML 9.9",
                "\x00",
                "tokens: !!float x",
                "seed: &x\n  <<: *x",
                "a: " * 90,
            )
        )
    file = case.write(case.folder / "c.yaml", text)
    case.command("check", "--config", str(file))


@kind("Python settings")
def python_settings(case: Case) -> None:
    names = [
        flag[2:].replace("-", "_")
        for flag in FLAGS
        if flag not in ("--config", "--resume", "--model", "--data")
    ]
    given = {case.draw.choice(names): case.nasty() for _ in range(2)}
    model: Any = case.base.teacher if case.draw.random() < 0.7 else case.nasty()
    mismatch.check(model, given.pop("swap", SPECS[0]), **given)


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
