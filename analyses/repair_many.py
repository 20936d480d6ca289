"""Many layers replaced at once: does it matter in which order they are repaired?

    python analyses/repair_many.py            about 14 minutes of CPU; goes on where it was stopped

Layers 4, 8, ..., 28 of SmolLM2 become `gated_deltanet`. `sequential` repairs them in depth order, each on the stream
of the student as repaired so far, towards the teacher's values; `joint` repairs each on the teacher's stream, as if it
stood alone. Same text, same stages, same steps; evaluated on held-out text of another source. The paired difference is
over documents. Writes figures/repair_many/{orders.csv,json,png}.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

import mismatch

SWAP = "layers[4-28/4]:gated_deltanet"
ORDERS = ("sequential", "joint")
STAGES = ("closed-form", "local")
SEQ_LEN = 512
COLOURS = {"sequential": "#0072b2", "joint": "#d55e00"}
HERE = Path(__file__).resolve().parent.parent / "figures" / "repair_many"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="what to repair")
    parser.add_argument("--swap", default=SWAP, help="several modules")
    parser.add_argument("--epochs", type=int, default=5, help="times through the text, each stage")
    parser.add_argument("--train-tokens", type=int, default=12288, help="to train on")
    parser.add_argument("--tokens", type=int, default=2048, help="to evaluate on")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for order in ORDERS:
        file = args.output / f"{order}.json"
        if not file.exists():
            file.write_text(json.dumps(repair(order, args), indent=2) + "\n")
    frame = table(args.output)
    frame.to_csv(args.output / "orders.csv", index=False)
    figure(frame, args.swap).savefig(args.output / "orders.png", dpi=200)
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4f}"))
    print(verdict(frame))


def repair(order: Any, args: argparse.Namespace) -> dict:
    """One order: what `mismatch.repair` gives."""
    result = mismatch.repair(
        args.model,
        args.swap,
        order=order,
        stages=STAGES,
        min_gain=0.0,
        max_minutes=None,
        epochs=args.epochs,
        seq_len=SEQ_LEN,
        train_tokens=args.train_tokens,
        self_generated=0.0,
        tokens=args.tokens,
        probes=(),
        trace_tokens=0,
        progress=True,
    )
    print(result.summary(), file=sys.stderr)
    return {
        "swap": args.swap,
        "order": order,
        "epochs": args.epochs,
        "train_tokens": args.train_tokens,
        "tokens": args.tokens,
        "threads": torch.get_num_threads(),
        "plan": asdict(result.plan),
        "versions": mismatch.versions(),
    }


def table(folder: Path) -> pd.DataFrame:
    """A row per order and stage, and the controls."""
    rows = []
    for order in ORDERS:
        plan = json.loads((folder / f"{order}.json").read_text())["plan"]
        for stage in plan["stages"]:
            names = (
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
            rows.append({"order": order, "stage": stage["name"], **{n: stage[n] for n in names}})
        for name, found in plan["students"].items():
            if name not in ("swap", "repaired") and order == ORDERS[0]:
                kl, lo, hi = found["kl"]
                rows.append({"order": "control", "stage": name, "kl": kl, "lo": lo, "hi": hi})
    return pd.DataFrame(rows)


def last(frame: pd.DataFrame, order: str) -> pd.Series:
    """The last stage of an order that was kept."""
    mine = frame[frame["order"] == order]
    return mine[mine["kept"].astype(bool)].iloc[-1]


def verdict(frame: pd.DataFrame) -> str:
    """Which order leaves less, where their intervals are apart."""
    one, other = (last(frame, order) for order in ORDERS)
    said = ", ".join(
        f"{row['order']} {row['kl']:.3f} [{row['lo']:.3f}, {row['hi']:.3f}]" for row in (one, other)
    )
    if one["hi"] < other["lo"]:
        return f"sequential is better: {said} nats left"
    if other["hi"] < one["lo"]:
        return f"joint is better: {said} nats left"
    return f"the intervals overlap: {said} nats left"


def figure(frame: pd.DataFrame, swap: str) -> Figure:
    """KL after each stage, both orders, controls dashed."""
    picture = Figure(figsize=(6.0, 3.2), layout="constrained")
    ax = picture.subplots()
    stages = list(dict.fromkeys(frame.loc[frame["order"] != "control", "stage"]))
    for shift, order in zip((-0.06, 0.06), ORDERS, strict=True):
        mine = frame[frame["order"] == order]
        x = [stages.index(stage) + shift for stage in mine["stage"]]
        bars = [(mine["kl"] - mine["lo"]).clip(lower=0), (mine["hi"] - mine["kl"]).clip(lower=0)]
        ax.errorbar(
            x,
            mine["kl"],
            yerr=bars,
            marker="o",
            ms=5,
            capsize=2,
            lw=1,
            color=COLOURS[order],
            label=order,
        )
    for row in frame[frame["order"] == "control"].itertuples():
        ax.axhline(row.kl, color="#777777", lw=0.8, ls="--")
        ax.annotate(
            row.stage, (1.0, row.kl), xycoords=("axes fraction", "data"), xytext=(4, 0), va="center",
            textcoords="offset points", fontsize=8, color="#777777",
        )  # fmt: skip
    ax.set_xticks(range(len(stages)), stages)
    ax.set_yscale("log")
    ax.set_yticks([0.3, 0.5, 1.0], ["0.3", "0.5", "1"])
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_ylabel("KL to the teacher, nats per token")
    ax.set_title(f"{swap}, repaired in two orders", loc="left", fontsize=9)
    ax.legend(frameon=False, fontsize=8)
    return picture


if __name__ == "__main__":
    main()
