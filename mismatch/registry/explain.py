"""What a name means: mechanisms, metrics, sites and errors, from their own texts. No torch.

Nothing is described twice: the texts are the docstrings of the files themselves.
"""

from __future__ import annotations

import csv
import functools
import inspect
import re
import textwrap
from collections.abc import Iterable, Sequence
from importlib import resources

from mismatch import errors
from mismatch.errors import MismatchError, UsageError
from mismatch.registry import Registry, did_you_mean, mechanisms, metrics, probes
from mismatch.registry.card import REQUIRED, Card, docstring
from mismatch.texts.demo.fetch import SOURCES


def list_mechanisms() -> dict[str, str]:
    """What can go into a slot: name -> one line."""
    return _summaries(mechanisms())


def list_metrics() -> dict[str, str]:
    """What can be measured: name -> one line."""
    return _summaries(metrics())


def list_probes() -> dict[str, str]:
    """What a model can be asked: name -> one line."""
    return _summaries(probes())


def list_sites() -> dict[str, str]:
    """Where it can be measured: name -> one line, in computation order. From the table in
    `mismatch.forward.sites`."""
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", docstring("mismatch.forward.sites"), re.M)
    return {name: text.replace("`", "") for name, text in rows}


def list_models() -> dict[str, str]:
    """Models that `mismatch fetch` gets: name -> one line. Any folder of a known family works too."""
    return _fetchable("model")


def list_texts() -> dict[str, str]:
    """Texts that `mismatch fetch` gets: name -> one line. Any .txt, .jsonl or folder works too."""
    return _fetchable("text")


LISTS = {
    "mechanisms": list_mechanisms,
    "metrics": list_metrics,
    "probes": list_probes,
    "sites": list_sites,
    "models": list_models,
    "texts": list_texts,
}


def explain(name: str) -> str:
    """All that is known about a mechanism, a metric, a probe, a site or an error, as text.

    Raises:
        UsageError: nothing has this name.
    """
    parts = [
        _card_text(r.kind, r.card(name)) for r in (mechanisms(), metrics(), probes()) if name in r
    ]
    if ":" in name:
        parts.append(_card_text("mechanism", mechanisms().card(name)))
    if name in list_sites():
        parts.append(f"{name}   site\n\n{list_sites()[name]}")
    if name in _errors():
        parts.append(_error_text(_errors()[name]))
    if not parts:
        known = [
            *(word for r in (mechanisms(), metrics(), probes()) for word in r.names()),
            *list_sites(),
            *_errors(),
        ]
        raise UsageError(f"nothing is called `{name}`", hint=did_you_mean(name, known))
    return "\n\n\n".join(parts)


def state_bytes(name: str) -> str | None:
    """Size of the state that a mechanism carries through `generate()`, in bytes, as text; None where none was counted.

    The sizes are those that analyses/mechanism_costs.py counted.
    """
    row = _counted().get(name)
    if row is None:
        return None
    first, second, most = (int(row[f"state_{when}"]) for when in ("1024", "2048", "most"))
    if second == 0:
        return "0 (the cache only counts tokens, or belongs to the attention beside it)"
    if first == second:
        size = f"{second:,} whatever the length"
        size = size if most == second else f"{second:,} to {most:,} whatever the length"
    else:
        size = f"{first:,} after 1024 tokens, {second:,} after 2048"
    of = "" if row["swap"] == name else f"{row['swap']}, "
    return f"{size} ({of}a layer of SmolLM2-135M, one text, float32)"


@functools.cache
def _counted() -> dict[str, dict[str, str]]:
    path = resources.files("mismatch.mechanisms") / "state_bytes.csv"
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    return {row["mechanism"]: row for row in rows}


def columns(rows: Iterable[Sequence[str]], indent: str = "", width: int | None = None) -> str:
    """Rows of text with aligned columns. With a width, the last column is wrapped to it."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    start = len(indent) + sum(widths) + 2 * len(widths)
    lines = []
    for *cells, last in rows:
        head = indent + "".join(f"{cell:<{w}}  " for cell, w in zip(cells, widths, strict=True))
        parts = [last] if width is None else textwrap.wrap(last, max(width - start, 20)) or [""]
        lines += [head + parts[0], *(" " * start + part for part in parts[1:])]
    return "\n".join(line.rstrip() for line in lines)


def _summaries(registry: Registry) -> dict[str, str]:
    # The name opens the summary of its own file ("zero: the module runs, ..."); once is enough.
    return {
        name: registry.card(name).summary.removeprefix(f"{name}: ") for name in registry.names()
    }


def _fetchable(kind: str) -> dict[str, str]:
    return {
        source.name: f"{source.what} ({source.megabytes:g} MB, {source.licence})"
        for source in SOURCES.values()
        if source.kind == kind
    }


def _errors() -> dict[str, type[MismatchError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, MismatchError)
    }


def _card_text(kind: str, card: Card) -> str:
    parts = [f"{card.name}   {kind}", card.text]
    if card.args:
        rows = [
            (arg.name, arg.allowed, _default(arg.default), " ".join(arg.doc.split()))
            for arg in card.args
        ]
        parts.append("arguments\n" + columns(rows, "  ", 100))
    facts = {key: _fact(value) for key, value in card.facts.items()}
    if kind == "mechanism" and (counted := state_bytes(card.name)) is not None:
        facts["state in bytes"] = counted
    if facts:
        parts.append("facts\n" + columns(facts.items(), "  ", 100))
    return "\n\n".join(parts)


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_fact(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _default(value: object) -> str:
    if value is REQUIRED:
        return "required"
    return f"default {str(value).lower() if value is None or isinstance(value, bool) else value}"


def _error_text(error: type[MismatchError]) -> str:
    # The line of the tree in errors.py that describes when it is raised.
    line = re.search(rf"\b{error.__name__} +\d +(.+)", errors.__doc__ or "")
    text = (line.group(1) if line else "").capitalize() + "."
    own = inspect.cleandoc(error.__doc__) if "__doc__" in vars(error) and error.__doc__ else ""
    parents = " > ".join(c.__name__ for c in reversed(error.__mro__[:-3]))
    body = "\n\n".join(part for part in (text, own) if part)
    return f"{error.__name__}   error\n\n{body}\n\nexit code {error.exit_code}\n{parents}"
