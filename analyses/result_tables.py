"""Write the tables of docs/results: `python analyses/result_tables.py`. A test asks that they are up to date.

Each number is read from `figures/`, where an analysis put it. Tables of what the code knows by itself (mechanisms,
metrics, probes, flags) are made by `docs/generate.py` when the site is built.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tables_of_bounded_state
import tables_of_costs
import tables_of_repair
import tables_of_swaps

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"

TABLES: dict[str, Callable[[], str]] = {
    "coverage": tables_of_swaps.coverage,
    "layer12": tables_of_swaps.layer12,
    "before": tables_of_repair.before_training,
    "costs": tables_of_costs.costs,
    "carriers": tables_of_swaps.carriers,
    "plans": tables_of_swaps.plans,
    "selectors": tables_of_swaps.selectors,
    "selected": partial(tables_of_swaps.selected, "sliding_window"),
    "selected, linear": partial(tables_of_swaps.selected, "linear_attention"),
    "selected, repaired": tables_of_swaps.selected_repaired,
    "scan cost": tables_of_costs.scan_cost,
    "large model": tables_of_costs.large_model,
    "ranks": tables_of_costs.ranks,
    "trace cost": tables_of_costs.trace_cost,
    "trace shares": tables_of_costs.trace_shares,
    "repair cost": tables_of_costs.repair_cost,
    "stages": tables_of_repair.stages,
    "repair": tables_of_repair.repair,
    "options": tables_of_repair.options,
    "smaller cache": tables_of_repair.smaller_cache,
    "initial": tables_of_repair.initial,
    "minutes": tables_of_repair.minutes,
    "repair first": tables_of_repair.repair_first,
    "harness": partial(tables_of_bounded_state.harness, "table"),
    "harness, trained": partial(tables_of_bounded_state.harness, "trained/table"),
    "bounded all": partial(tables_of_bounded_state.bounded, "all", "512"),
    "bounded all, long": partial(tables_of_bounded_state.bounded, "all", "2048"),
    "bounded 18": partial(tables_of_bounded_state.bounded, "18", "512"),
    "bounded 18, long": partial(tables_of_bounded_state.bounded, "18", "2048"),
    "bounded gemma": partial(tables_of_bounded_state.bounded, "gemma", "512"),
    "forecast": tables_of_repair.fresh,
}


def _renewed(table: Callable[[], str], found: re.Match[str]) -> str:
    return f"{found[1]}\n{table()}\n\n{found[2]}"


def filled(text: str) -> str:
    """The text of a page with every generated table renewed."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(
            pattern,
            partial(_renewed, table),
            text,
            flags=re.S,
        )
    return text


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for page in sorted(RESULTS.glob("*.md")):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
