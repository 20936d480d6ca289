"""Commands and flags. Those of a stage are made from its card and the fields of its Config."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from mismatch import config
from mismatch.cli import commands
from mismatch.errors import UsageError
from mismatch.registry import did_you_mean, stages
from mismatch.registry.card import REQUIRED, Arg
from mismatch.registry.explain import LISTS
from mismatch.registry.meaning import REPEATED
from mismatch.stages import STAGES

EXAMPLES = {
    "mismatch": (
        'mismatch trace --model smollm2 --swap "layer12:infini"',
        "mismatch explain infini",
    ),
    "check": (
        'mismatch check --model smollm2 --swap "layer12:infini(segment=64)"',
        'mismatch check --model smollm2 --swap "norms:dyt" --json',
    ),
    "merge": (
        "mismatch merge CHECKPOINT plain-model",
        "mismatch merge CHECKPOINT plain-model --json",
    ),
    "generate": (
        'mismatch generate CHECKPOINT "Once upon a time"',
        'mismatch generate smollm2 "Name three colours." --chat --temperature 0.7 --seed 1',
    ),
    "fetch": ("mismatch fetch smollm2", "mismatch fetch wiki sotu"),
    "report": ("mismatch report runs/RUN", "mismatch report runs/RUN --output report.html"),
    "compare": (
        "mismatch compare runs/FIRST runs/SECOND",
        "mismatch compare runs/PLAN runs/SCAN --ranking published.yaml",
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
            if word == "--student" and args.command in _stages():
                raise UsageError(
                    f"`mismatch {args.command}` tries mechanisms, and takes no student",
                    hint="`mismatch trace --student` measures a model that was trained elsewhere",
                )
            raise UsageError(
                f"`mismatch {args.command}` has no flag `{word}`",
                hint=why
                if (why := config.refused(args.command, word))
                else f"did you mean `{near[0]}`?"
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
        description=_examples(EXAMPLES["mismatch"])
        + "\n\nSwap a module of a pretrained language model; see where, why and how badly it breaks; repair it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    tree.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    branches = tree.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", required=True
    )
    found: dict[str, Parser] = {}

    def command(name: str, text: str, examples: Sequence[str], handler: Any) -> Parser:
        found[name] = branches.add_parser(
            name,
            help=text,
            description=f"{_examples(examples)}\n\n{text}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        found[name].set_defaults(handler=handler)
        return found[name]

    for name in _stages():
        facts = stages().card(name).facts
        stage = command(name, facts["help"], facts.get("examples", ()), commands.stage)
        _stage(stage, name, facts)
        if name == "trace":
            text = (
                "Print the plan, the parameters and the cost of a trace, without loading weights."
            )
            check = command("check", text, EXAMPLES["check"], commands.check)
            _settings(check, stages().config(name))

    def other(name: str, text: str) -> Parser:
        made = command(name, text, EXAMPLES[name], getattr(commands, name))
        _common(made, made)
        return made

    _generate(
        other("generate", "Continue a text with a model, or with a checkpoint of a swapped one.")
    )
    merge = other(
        "merge", "Write a checkpoint as a plain model: adapters and factors become matrices."
    )
    merge.add_argument("model", metavar="CHECKPOINT", help="of a swapped model")
    merge.add_argument("output", metavar="FOLDER", help="the folder to make")
    merge.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model"
    )
    fetch = other("fetch", "Get demo models and texts: pinned by hash, converted, kept in a cache.")
    fetch.add_argument(
        "names", nargs="+", metavar="NAME", help="see `mismatch list models` and `texts`"
    )
    fetch.add_argument(
        "--accept-terms", action="store_true", help="accept the terms of models that have some"
    )
    report = other("report", "Write the report of a finished run again, from its table.")
    report.add_argument("run", metavar="RUN", help="run folder")
    report.add_argument("--output", metavar="FILE", help="default: report.html in the run folder")
    compare = other("compare", "Show several finished runs on one scale.")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    compare.add_argument(
        "--output", metavar="FILE", default="comparison.html", help="default: %(default)s"
    )
    compare.add_argument(
        "--any-data", action="store_true", help="also compare runs on different text"
    )
    compare.add_argument(
        "--ranking",
        metavar="FILE",
        help="print what the layers that plans and scans choose share with published lists, beside chance "
        "(YAML: model, layers, and lists by name under `replaced` or `kept`)",
    )
    listing = other("list", "List mechanisms, metrics, probes, sites, models or texts.")
    listing.add_argument("what", choices=tuple(LISTS), metavar="WHAT", help=", ".join(LISTS))
    explain = other("explain", "Explain a mechanism, a metric, a probe, a site or an error.")
    explain.add_argument("name", metavar="NAME")
    other("env", "Print versions and devices, for a bug report.")
    return tree, found


def _stages() -> list[str]:
    """The stages in the order of their table; those of other packages behind them."""
    order = list(STAGES)
    names = stages().names()
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _stage(parser: Parser, name: str, facts: Mapping[str, Any]) -> None:
    """The flags of a stage."""
    output = _settings(parser, stages().config(name))
    if facts.get("resumable"):
        output.add_argument("--resume", metavar="RUN", help="go on with an interrupted run")
    output.add_argument("--overwrite", action="store_true", help="replace the run in --output")
    if kinds := facts.get("starts_from"):
        what = " or ".join(kinds)
        takes = ", ".join(taken.replace("_", "-") for taken in facts["takes"])
        parser.add_argument(
            "run", nargs="?", metavar="RUN", help=f"a run of {what}: takes over its {takes}"
        )


def _settings(parser: Parser, kind: type[config.RunConfig]) -> argparse._ArgumentGroup:
    """The flags of a config in their groups, and those of every command; returns the group `output`."""
    titles, known = kind.groups, config.fields(kind)
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
    if arg.default is not REQUIRED and arg.default is not None and arg.type != "bool":
        shown = ",".join(arg.default) if isinstance(arg.default, tuple) else arg.default
        text += f" (default: {'none' if shown == '' else shown})"
    if arg.type == "bool":
        group.add_argument(flag, dest=arg.name, action=argparse.BooleanOptionalAction, help=text)
        return
    repeated = "append" if arg.name in REPEATED else "store"
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
    "trainer": "NAME=VALUE",
    "student": "MODEL",
    "device": "DEVICE",
    "device_map": "MAP",
    "revision": "REVISION",
    "data": "DATA",
    "calibration_data": "DATA",
    "train_data": "DATA",
    "scan": "RUN",
    "earlier_run": "RUN",
    "selected_by": "RUN",
    "activations_dir": "FOLDER",
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
