"""How much of what Infini-attention breaks at layer 12 does each stage of the repair recover, at what cost?

    python analyses/repair_layer12.py             about 15 minutes each; one that is written down already
                                                  is not run again

SmolLM2, `infini(segment=64)` with and without a sink in attention of layer 12, trained on `sotu` and self-generated
text, evaluated on `wiki`: `mismatch repair` with its defaults. Its ten minutes are of the clock, sampling and the
teacher's pass included, evaluation and probes not; so a faster machine gets further. The CPU time of the whole is
written beside it. Both gaps are also given against the KL of the unrepaired swap WITHOUT a sink, so that they compare.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pandas as pd
import torch

import mismatch
from mismatch.report import style
from mismatch.runs.plan import as_json, from_json
from mismatch.stages.repair.plan import RepairPlan
from mismatch.stages.repair.report.curve_figure import repair_curve

SWAPS = {"plain": "layer12:infini(segment=64)", "sink": "layer12:infini(segment=64,sinks=1)"}
HERE = Path(__file__).resolve().parent.parent / "figures" / "repair_layer12"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SWAPS, help="one of the two, in this process")
    parser.add_argument("--minutes", type=float, default=10.0, help="that each repair has")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in [args.only] if args.only else SWAPS:
        kept = args.output / f"{name}.json"
        if not kept.exists():
            repair(name, args)
        picture = repair_curve(plan_of(kept))
        (args.output / f"{name}.png").write_bytes(style.to_bytes(picture, "png"))
    if all((args.output / f"{name}.json").exists() for name in SWAPS):
        print(table(args.output).to_string(index=False))


def plan_of(file: Path) -> RepairPlan:
    """The plan of a kept repair. Older files do not say which modules were replaced, which no curve shows."""
    made = json.loads(file.read_text())
    return from_json(RepairPlan, {"spec": made["swap"], "clauses": [], **made["plan"]}, file)


def repair(name: str, args: argparse.Namespace) -> None:
    started = time.process_time()
    result = mismatch.repair("smollm2", SWAPS[name], max_minutes=args.minutes, progress=True)
    print(result.summary(), file=sys.stderr)
    made = {
        "swap": SWAPS[name],
        "minutes": args.minutes,
        "cpu_seconds": time.process_time() - started,
        "threads": torch.get_num_threads(),
        "plan": as_json(result.plan),
        "versions": mismatch.versions(),
    }
    (args.output / f"{name}.json").write_text(json.dumps(made, indent=2) + "\n")


def table(folder: Path) -> pd.DataFrame:
    """Every stage that was run, of both, with the gap against the plain swap; written as csv."""
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in SWAPS}
    whole = found["plain"]["plan"]["stages"][0]["kl"]
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
        {
            "swap": made["swap"],
            **{c: stage[c] for c in columns},
            "of_plain": 1 - stage["kl"] / whole,
        }
        for made in found.values()
        for at, stage in enumerate(made["plan"]["stages"])
        if at == 0 or stage["tokens"]  # one that had no time is no row
    ]
    frame = pd.DataFrame(rows)
    frame.to_csv(folder / "stages.csv", index=False)
    return frame


if __name__ == "__main__":
    main()
