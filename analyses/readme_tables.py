"""Write the tables of README.md: `python analyses/readme_tables.py`. A test asks that they are up to date."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from mismatch.models.layout import FAMILIES
from mismatch.registry import mechanisms, metrics, probes

README = Path(__file__).resolve().parent.parent / "README.md"


COSTS = README.parent / "figures" / "mechanism_table" / "costs.csv"


def mechanism_table() -> str:
    """Name, what it is, source, slots, identity limit, families."""
    rows = []
    registry = mechanisms()
    counted = _costs()
    for name in registry.names():
        card = registry.card(name)
        slots = card.facts["slots"]
        shown = ", ".join(slots[:3]) + (", ..." if len(slots) > 3 else "")
        what = card.summary.partition(": ")[2] or card.summary
        limit = card.facts["identity"]
        limit = "never" if limit.startswith("none: ") else limit
        has = counted[name]["families"].split()
        lacks = [family.name for family in FAMILIES if family.name not in has]
        families = f"all but {', '.join(lacks)}" if lacks else "all"
        source = _links(card.facts["source"])
        rows.append((f"`{name}`", what.rstrip("."), source, shown, limit, families))
    head = (
        "mechanism",
        "what it is",
        "source",
        "slots (first: default)",
        "equals the original when",
        "families",
    )
    return _table(head, rows)


def cost_table() -> str:
    """What `python analyses/mechanism_costs.py` counted and timed."""
    rows = []
    for row in _costs().values():
        first, second, most = (int(row[f"state_{when}"]) for when in ("1024", "2048", "most"))
        peak = "" if most == max(first, second) else f", at most {most:,} between"
        state = (f"{first:,}", f"{second:,}{peak}")
        times = (f"{float(row['forward']):.2f}", f"{float(row['both']):.2f}")
        rows.append((f"`{row['swap']}`", row["part"], f"{int(row['new']):,}", *times, *state))
    head = (
        "mechanism",
        "part",
        "new parameters",
        "forward",
        "with backward",
        "state, 1024 tokens",
        "state, 2048 tokens",
    )
    return _table(head, rows)


def _costs() -> dict[str, dict[str, str]]:
    with open(COSTS, newline="") as file:
        return {row["mechanism"]: row for row in csv.DictReader(file)}


def _links(source: str) -> str:
    """arXiv numbers as links, the first words of a source only."""
    short = re.split(r"; |, (?=section|eq|table|sections|initial|algorithm)", source)[0]
    return re.sub(r"\b(\d{4}\.\d{5})(v\d)?\b", r"[\1](https://arxiv.org/abs/\1)", short)


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


def rung_table() -> str:
    """What `python analyses/repair_layer12.py` measured."""
    with open(README.parent / "figures" / "repair_layer12" / "rungs.csv", newline="") as file:
        found = {(row["swap"], row["name"]): row for row in csv.DictReader(file)}
    swaps = list(dict.fromkeys(swap for swap, _ in found))
    rows = []
    for rung in dict.fromkeys(rung for _, rung in found):
        cells = [f"`{rung}`"]
        for swap in swaps:
            row = {name: found[swap, rung][name] for name in ("kl", "lo", "hi")}
            cells += [
                _interval({**row, "value": row["kl"]}),
                f"{100 * float(found[swap, rung]['of_plain']):.0f} %",
            ]
        rows.append(tuple(cells))
    names = [swap.partition(":")[2] for swap in swaps]
    head = [cell for name in names for cell in (f"`{name}`: KL left", "closed")]
    return _table(("after", *head), rows)


def repair_table() -> str:
    """What `python analyses/repair_table.py` measured."""
    with open(README.parent / "figures" / "repair_table" / "table.csv", newline="") as file:
        found = list(csv.DictReader(file))
    rows = []
    for row in found:
        kl = [_kl(row, student) for student in ("swap", "repaired", "zero", "linear")]
        closed = tuple(100 * float(row[name]) for name in ("gap_closed", "gap_lo", "gap_hi"))
        gap = "{:.0f} % [{:.0f}, {:.0f}]".format(*closed)
        rows.append((f"`{row['mechanism']}`", kl[0], kl[1], gap, *kl[2:], row["verdict"]))
    head = ("layer 12", "swapped", "repaired", "gap closed", "`zero`", "`linear`", "verdict")
    return _table(head, rows)


def _kl(row: dict[str, str], student: str) -> str:
    names = zip(("value", "lo", "hi"), ("", "_lo", "_hi"), strict=True)
    return _interval({name: row[f"{student}{part}"] for name, part in names})


TABLES = {
    "mechanisms": mechanism_table,
    "costs": cost_table,
    "metrics": metric_table,
    "probes": probe_table,
    "layer12": layer12_table,
    "rungs": rung_table,
    "repair": repair_table,
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


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
