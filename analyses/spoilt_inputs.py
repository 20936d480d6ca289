"""Input that is broken, enormous or made to harm: how it is made. For `malformed_inputs.py`, which hands it over.

    python analyses/spoilt_inputs.py     the kinds of input that are no files: swap text, flags, YAML, Python settings

A `Base` holds valid input of each kind, made once; a `Case` spoils one of them in a drawn way and hands it to what
reads it: the command line in this process, or a public function.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

import mismatch
from mismatch import cli
from mismatch.errors import MismatchError
from mismatch.runs.folder import RunFolder

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

    @cached_property
    def stopped(self) -> dict[str, Path]:
        """By command, a run that was stopped: the sums of a trace, the Trainer's checkpoints of a training."""
        few = ("max_steps=2", "save_strategy=steps", "save_steps=1")
        settings = {
            "trace": ("trace", "--swap", SPECS[0], *self.words, "--metrics", "kl"),
            "train": (*self.training, *(word for one in few for word in ("--trainer", one))),
        }
        found = {verb: self.folder / f"stopped {verb}" for verb in settings}
        for verb, words in settings.items():
            with (
                mock.patch.object(RunFolder, "write_table", side_effect=KeyboardInterrupt),
                contextlib.suppress(Refused),
            ):
                Case(self, self.folder, random.Random(0)).command(
                    *words, "--output", str(found[verb])
                )
        return found

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

    @property
    def training(self) -> tuple[str, ...]:
        """A small training, but for its length."""
        for name in ("evaluated", "trained"):
            texts = [
                f"the text {n} {name} is " + f"of many words that are {name} " * 20
                for n in range(20)
            ]
            lines = "\n".join(json.dumps({"text": text}) for text in texts)
            (self.folder / f"{name}.jsonl").write_text(lines)
        evaluated, trained = (
            str(self.folder / f"{name}.jsonl") for name in ("evaluated", "trained")
        )
        data = ("--data", evaluated, "--train-data", trained)
        small = ("--train-tokens", "256", "--val-tokens", "64", "--probes", "none")
        return ("train", "--swap", SPECS[0], *self.words, *data, *small)


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


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print("\n".join(KINDS))


if __name__ == "__main__":
    main()
