"""Pages of the command line, from the parser itself: the same flags, texts and defaults as `--help`."""

from __future__ import annotations

import argparse
import re

import md_text

from mismatch.cli import parser as cli
from mismatch.registry.card import docstring

DEFAULT = re.compile(r" ?\(?default: (.*?)\)?$")
HIDDEN = ("--help",)


def commands() -> dict[str, argparse.ArgumentParser]:
    """Command -> its parser, in the order of `mismatch --help`."""
    return dict(cli._tree()[1])


def command_pages() -> dict[str, str]:
    """Path -> page: the list of the commands, and a page for each."""
    found = commands()
    rows = [
        (f"[`mismatch {name}`]({name}.md)", md_text.inline(_what(parser)))
        for name, parser in found.items()
    ]
    codes = re.findall(r"^    (\d+) +(.+)$", docstring("mismatch.cli"), re.M)
    index = "\n\n".join(
        [
            "# Command line",
            "Results go to stdout (`--json` for machines), progress and hints to stderr.",
            md_text.table(("command", "what it does"), rows),
            "## Exit codes",
            md_text.table(
                ("code", "meaning"), [(code, md_text.inline(text)) for code, text in codes]
            ),
            "Which error has which code: [errors](../errors.md).",
            md_text.toctree(*found, hidden=True),
        ]
    )
    made = {"commands/index.md": index}
    return made | {f"commands/{name}.md": command_page(name, p) for name, p in found.items()}


def command_page(name: str, parser: argparse.ArgumentParser) -> str:
    """Examples, then every flag in the groups of the help."""
    examples = re.findall(r"^  (.+)$", parser.description or "", re.M)
    out = [f"# mismatch {name}", md_text.inline(_what(parser))]
    if examples:
        out.append("\n".join(["```bash", *examples, "```"]))
    positional, options, *others = parser._action_groups
    for group in (positional, *others, options):
        rows = [_row(action) for action in group._group_actions if _shown(action)]
        if rows:
            title = (group.title or "").capitalize()
            head = ("flag", "value", "default", "meaning")
            out.append(f"## {title}\n\n" + md_text.table(head, rows))
    return "\n\n".join(out)


def _what(parser: argparse.ArgumentParser) -> str:
    return (parser.description or "").strip().rsplit("\n", 1)[-1].strip()


def _shown(action: argparse.Action) -> bool:
    return action.help is not argparse.SUPPRESS and not set(HIDDEN) & {*action.option_strings}


def _row(action: argparse.Action) -> tuple[str, str, str, str]:
    names = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar}`"
    text = (action.help or "").replace("%%", "%").replace("%(default)s", str(action.default))
    found = DEFAULT.search(text)
    default = f"`{found[1]}`" if found and found[1] else ""
    value = "" if action.nargs == 0 or not action.option_strings else _value(action)
    return names, value, default, md_text.inline(DEFAULT.sub("", text))


def _value(action: argparse.Action) -> str:
    words = str(action.metavar or "")
    return ", ".join(f"`{word}`" for word in words.split("|")) if "|" in words else f"`{words}`"
