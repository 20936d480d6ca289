"""What every table of docs/results is made of: rows of figures/, intervals in words, markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

FIGURES = Path(__file__).resolve().parent.parent / "figures"

Row = Mapping[str, str]


def read(name: str) -> list[dict[str, str]]:
    with open(FIGURES / name, newline="") as file:
        return [*csv.DictReader(file)]


def interval(row: Row, digits: int = 4) -> str:
    value, lo, hi = (float(row[name]) for name in ("value", "lo", "hi"))
    if value == lo == hi == 0:
        return "0"
    if abs(value) < 0.5 * 10**-digits:
        return f"{value:.0e}"  # rounding: an interval would say no more
    # Adding 0 makes 0.0000 of what would read -0.0000.
    value, lo, hi = (round(x, digits) + 0.0 for x in (value, lo, hi))
    return f"{value:.{digits}f} [{lo:.{digits}f}, {hi:.{digits}f}]"


def kl_of(row: Row, student: str) -> str:
    names = zip(("value", "lo", "hi"), ("", "_lo", "_hi"), strict=True)
    return interval({name: row[f"{student}{end}"] for name, end in names})


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [[*head], *([*row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
