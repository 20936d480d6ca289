"""Reading pages of the documentation, for its tests: links, headings, blocks of code, commands."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

from mismatch.cli import parser

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

FENCE = re.compile(r"^```(\{?[\w-]*\}?)[^\n]*\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:^|\s)(?:python )?(?:\S*/)?mismatch(?= [a-z])")


def load(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands() -> dict[str, argparse.ArgumentParser]:
    """Command -> its parser."""
    return parser._tree()[1]


def blocks(text: str, *languages: str) -> list[str]:
    """The blocks of code of a page in these languages."""
    return [code for language, code in FENCE.findall(text) if language in languages]


def links(text: str) -> list[str]:
    """Where a page points at: targets of links and pictures, code left out."""
    plain = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    return LINK.findall(plain)


def anchors(text: str) -> set[str]:
    """The headings of a page as GitHub and MyST make anchors of them."""
    found = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in found}


def command_lines(text: str) -> list[list[str]]:
    """What is typed behind `mismatch` in the shell blocks of a page, as words."""
    found = []
    for code in blocks(text, "bash", "sh", "console", ""):
        for line in code.replace("\\\n", " ").splitlines():
            start = COMMAND.search(line)
            if start and not line.lstrip().startswith("#"):
                found.append(shlex.split(line[start.end() :], comments=True))
    return found
