"""One layer of a real model, five replacements: is the order of the damage what the mechanisms promise?

    python analyses/layer12.py                    about 8 minutes on two cores

Attention of layer 12 of SmolLM2-135M-Instruct (dequantised from 4 bits), 8192 held-out Wikipedia tokens in windows of
1024, calibration on speeches. Expected: identity (exactly 0) < a window of 64 with one sink < Infini-attention with
segments of 64 < attention deleted < random weights. Writes the table and the figures of the README.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pandas as pd

import mismatch

ORDER = ("identity", "sliding_window(window=64, sinks=1)", "infini(segment=64)", "zero", "random")
HERE = Path(__file__).resolve().parent.parent / "figures" / "layer12"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders go")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    teacher = mismatch.load("smollm2")
    rows = []
    for swap in ORDER[:3]:
        # The last two are controls: they run beside infini, on the same tokens.
        infini = swap.startswith("infini")
        controls = ("zero", "mean", "random") if infini else ()
        folder = args.runs / f"layer12-{swap.partition('(')[0]}"
        shutil.rmtree(folder, ignore_errors=True)
        result = mismatch.trace(
            teacher,
            swap=f"layer12:{swap}",
            tokens=args.tokens,
            controls=controls,
            metrics=None if infini else ("kl", "nll", "top1"),
            output=str(folder),
            progress=True,
        )
        rows += readings(result.table, swap)
        if infini and result.run_dir is not None:
            figures(result.run_dir, args.output)
    table = pd.DataFrame(rows)
    kl = table[table.metric == "kl"].set_index("swap").value
    holds = all(kl[a] < kl[b] for a, b in pairwise(ORDER))
    table.to_csv(args.output / "layer12.csv", index=False)
    made = {"tokens": args.tokens, "order_holds": holds, "versions": mismatch.versions()}
    (args.output / "layer12.json").write_text(json.dumps(made, indent=2) + "\n")
    print(table.to_string(index=False))
    print(f"order {' < '.join(ORDER)}: {'holds' if holds else 'does not hold'}")
    sys.exit(0 if holds else 1)


def readings(table: pd.DataFrame, swap: str) -> list[dict]:
    """Output KL, NLL difference and top-1 disagreement of every student of a run."""
    found = table[(table.site == "logits") & (table.position == "all") & (table.student != "floor")]
    keep = {"kl": "mean", "nll": "mean", "top1": "mean"}
    found = found[found.stat == found.metric.map(keep)]
    return [
        {
            "swap": swap if row.student == "swap" else row.student,
            "metric": row.metric,
            "value": row.value,
            "lo": row.lo,
            "hi": row.hi,
            "n": row.n,
        }
        for row in found.itertuples()
    ]


def figures(run: Path, output: Path) -> None:
    """The pictures of the run, with their data."""
    output.mkdir(parents=True, exist_ok=True)
    for path in sorted((run / "figures").iterdir()):
        if path.suffix in (".png", ".csv", ".json"):
            shutil.copy(path, output / path.name)


if __name__ == "__main__":
    main()
