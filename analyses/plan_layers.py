"""Does what single layers cost say what several cost together?

    python analyses/plan_layers.py --scan RUN     about 10 minutes of CPU, one thread

From the finished scan of `scan_atlas.py`, `mismatch plan` picks the layers that Infini-attention replaces at least KL,
with and without a budget for the passkey, then replaces them together. Written down for each plan and question: what
the scan that chose them said in sum (too good: it took the smallest), the same layers one at a time on text and keys
that chose nothing (`predicted`), all together (`measured`), and the attention of the same layers deleted (`zero`).
A plan whose run folder is there already is read from it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

import mismatch

MECHANISM = "infini(segment=64)"
PLANS = {"4": (4, False), "8": (8, False), "8_keep_retrieval": (8, True)}
"""Layers to replace, and whether the passkey is kept."""
HERE = Path(__file__).resolve().parent.parent / "figures" / "plan_layers"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scan", type=Path, required=True, help="run folder of a finished scan")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the plans are kept")
    parser.add_argument("--only", choices=PLANS, help="one of the plans, in this process")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    scan = mismatch.load_run(args.scan)
    same = ("seq_len", "samples", "length", "batch_size", "tokens")
    sizes = {name: scan.config[name] for name in same}
    sizes["selection_tokens"] = scan.config["tokens"]
    teacher = mismatch.load(scan.manifest["model"])
    for name in [args.only] if args.only else PLANS:
        layers, keep = PLANS[name]
        folder = args.runs / f"plan_layers-{name}"
        if (folder / "metrics.parquet").exists():
            planned = mismatch.Planned(mismatch.load_run(folder))
        else:
            planned = mismatch.plan(
                teacher, MECHANISM, layers=layers, keep_retrieval=keep, scan=str(args.scan),
                output=str(folder), **sizes,
            )  # fmt: skip
        print(planned.summary())
        planned.figure().savefig(args.output / f"{name}.png", dpi=200)
        readings(planned).assign(plan=name).to_csv(args.output / f"{name}.csv", index=False)
        made = {
            "swap": planned.swap,
            "predicted_by_scan": asdict(planned.plan)["predicted_by_scan"],
            **sizes,
            "versions": mismatch.versions(),
        }
        (args.output / f"{name}.json").write_text(json.dumps(made, indent=2) + "\n")


def readings(planned: mismatch.Planned) -> pd.DataFrame:
    """Predicted, measured and their difference on each question, and the control; larger is worse."""
    costs = planned.costs[planned.costs["kind"] != "part"].copy()
    costs["kind"] = costs["kind"].map(
        {"sum": "predicted", "together": "measured", "control": "zero"}
    )
    table = planned.table
    for task, unit in costs[["task", "unit"]].drop_duplicates().itertuples(index=False):
        stat = "mean_minus_sum" if task == "text" else "lost_minus_sum"
        metric = "kl" if task == "text" else task
        rest = table[(table["metric"] == metric) & (table["stat"] == stat)].iloc[0]
        costs.loc[len(costs) + 1000] = {
            "task": task, "unit": unit, "kind": "measured - predicted", "name": "swap",
            "value": rest["value"], "lo": rest["lo"], "hi": rest["hi"], "n": rest["n"],
        }  # fmt: skip
    columns = ["task", "unit", "kind", "value", "lo", "hi", "n"]
    return costs.sort_values("task", kind="stable")[columns].assign(swap=planned.swap)


if __name__ == "__main__":
    main()
