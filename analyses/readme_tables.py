"""Write the tables of README.md: `python analyses/readme_tables.py`. A test asks that they are up to date."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from mismatch.registry import mechanisms, metrics, probes

README = Path(__file__).resolve().parent.parent / "README.md"


def mechanism_table() -> str:
    """Name, what it is, slots, arguments, identity limit."""
    rows = []
    registry = mechanisms()
    for name in registry.names():
        card = registry.card(name)
        args = ", ".join(f"{arg.name}={_value(arg.default)}" for arg in card.args)
        slots = card.facts["slots"]
        shown = ", ".join(slots[:4]) + (", ..." if len(slots) > 4 else "")
        what = card.summary.partition(": ")[2] or card.summary
        shown_args = f"`{args}`" if args else ""
        rows.append((f"`{name}`", what.rstrip("."), shown, shown_args, card.facts["identity"]))
    head = (
        "mechanism",
        "what it is",
        "slots (first: default)",
        "arguments",
        "equals the original when",
    )
    return _table(head, rows)


def metric_table() -> str:
    """Name, question, unit, what it reads at equality, what it cannot see."""
    rows = []
    registry = metrics()
    for name in registry.names():
        card = registry.card(name)
        question = card.summary.partition(": ")[2] or card.summary
        null = ", ".join(f"{stat} {value:g}" for stat, value in card.facts["null"].items())
        rows.append(
            (f"`{name}`", question.rstrip("."), card.facts["unit"], null, card.facts["blind"])
        )
    return _table(("metric", "question", "unit", "at equality", "cannot see"), rows)


def probe_table() -> str:
    """Name, question, headline, what it shows, what it cannot see."""
    rows = []
    for name in probes().names():
        card = probes().card(name)
        facts = card.facts
        question = card.summary.partition("?")[0] + "?"
        headline = f"`{facts['headline']}`, {facts['unit']}"
        rows.append((f"`{name}`", question, headline, facts["chance"], facts["blind"]))
    return _table(
        ("probe", "question", "headline", "a model that cannot reads", "cannot see"), rows
    )


def layer12_table() -> str:
    """What `python analyses/layer12.py` measured."""
    with open(README.parent / "figures" / "layer12" / "layer12.csv", newline="") as file:
        found = {(row["swap"], row["metric"]): row for row in csv.DictReader(file)}
    rows = []
    for swap in dict.fromkeys(swap for swap, _ in found):
        cells = [
            _interval(found[swap, name]) if (swap, name) in found else "" for name in ("kl", "nll")
        ]
        rows.append((f"`{swap}`", *cells))
    return _table(
        ("layer 12, attention", "KL, nats per token", "NLL difference, nats per token"), rows
    )


def _interval(row: dict[str, str]) -> str:
    value, lo, hi = (float(row[name]) for name in ("value", "lo", "hi"))
    return "0" if value == lo == hi == 0 else f"{value:.4f} [{lo:.4f}, {hi:.4f}]"


TABLES = {
    "mechanisms": mechanism_table,
    "metrics": metric_table,
    "probes": probe_table,
    "layer12": layer12_table,
}


def filled(text: str) -> str:
    """README text with every generated table renewed."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(
            pattern, lambda found, table=table: f"{found[1]}{table()}\n{found[2]}", text, flags=re.S
        )
    return text


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _value(default: object) -> str:
    if default is None or isinstance(default, bool):
        return str(default).lower()
    return "..." if repr(default) == "required" else str(default)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
