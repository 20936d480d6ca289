"""How much of the damage of each mechanism at one layer does repair recover, and what is left?

    python analyses/repair_table.py                 about 25 minutes of CPU; goes on where it was stopped
    python analyses/repair_table.py --only nope     one row

Layer 12 of SmolLM2, trained on `sotu`, evaluated on 8 documents of `wiki` in windows of 512, stages up to `block`, the
same steps for each; the controls `zero` and `linear` stand in the same slot on the same tokens. A mechanism that does
not repair is said to be one, with the reason that the numbers give. Writes figures/repair_table/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

import mismatch

LAYER = 12
SWAPS = {
    "sliding_window(64, 1)": "layer12:sliding_window(window=64, sinks=1)",
    "linear_attention": "layer12:linear_attention(feature_map=hedgehog)",
    "gated_deltanet": "layer12:gated_deltanet",
    "mamba2": "layer12:mamba2",
    "mamba2, norm before": "layer12:mamba2(norm=before)",
    "rwkv": "layer12:rwkv",
    "nope": "layer12:nope",
    "norms:dyt": "layer12.norms:dyt",
}
STAGES = ("inherit", "closed-form", "local", "block")
SEQ_LEN = 512
REPAIRED = 0.5
"""A smaller share of the gap that is closed is no repair."""
HARMLESS = 0.05
"""A swap that costs a smaller share of what deleting the module costs has little to repair."""
HERE = Path(__file__).resolve().parent.parent / "figures" / "repair_table"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SWAPS, help="one row")
    parser.add_argument("--model", default="smollm2", help="what to repair")
    parser.add_argument("--epochs", type=int, default=4, help="times through the text, each stage")
    parser.add_argument("--train-tokens", type=int, default=32768, help="to train on")
    parser.add_argument("--tokens", type=int, default=4096, help="to evaluate on")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mismatch-") as store:
        for name in [args.only] if args.only else SWAPS:
            if not _file(args.output, name).exists():
                repair(name, args, store)
    frame = table(args.output)
    frame.to_csv(args.output / "table.csv", index=False)
    figure(frame).savefig(args.output / "table.png", dpi=200)
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4f}"))


def repair(name: str, args: argparse.Namespace, store: str) -> None:
    """One row, saved."""
    started = time.process_time()
    result = mismatch.repair(
        args.model,
        SWAPS[name],
        stages=STAGES,
        max_minutes=None,
        epochs=args.epochs,
        seq_len=SEQ_LEN,
        min_gain=0.0,
        train_tokens=args.train_tokens,
        self_generated=0.0,
        tokens=args.tokens,
        activations_dir=store,
        progress=True,
    )
    print(result.summary(), file=sys.stderr)
    made = {
        "swap": SWAPS[name],
        "epochs": args.epochs,
        "cpu_seconds": time.process_time() - started,
        "train_tokens": args.train_tokens,
        "tokens": args.tokens,
        "threads": torch.get_num_threads(),
        "plan": asdict(result.plan),
        "versions": mismatch.versions(),
    }
    _file(args.output, name).write_text(json.dumps(made, indent=2) + "\n")


def _file(folder: Path, name: str) -> Path:
    return folder / f"{''.join(c if c.isalnum() else '_' for c in name).strip('_')}.json"


def table(folder: Path) -> pd.DataFrame:
    """A row per mechanism: before, after each stage, what is left, the gap closed, controls, and the verdict."""
    rows = []
    for name, swap in SWAPS.items():
        if not _file(folder, name).exists():
            continue
        plan = json.loads(_file(folder, name).read_text())["plan"]
        students = plan["students"]
        row: dict[str, Any] = {"mechanism": name, "spec": swap}
        for student in ("swap", "repaired", "zero", "linear"):
            for part, value in zip(("", "_lo", "_hi"), students[student]["kl"], strict=True):
                row[f"{student}{part}"] = value
        closed = students["repaired"]["gap_closed"]
        row |= {"gap_closed": closed[0], "gap_lo": closed[1], "gap_hi": closed[2]}
        for stage in plan["stages"][1:]:
            row[f"after {stage['name']}"] = stage["kl"] if stage["kept"] else float("nan")
        row["seconds"] = sum(stage["seconds"] for stage in plan["stages"])
        bypassed = any(at["verdict"] == "bypassed" for at in plan.get("branches", ()))
        row["verdict"] = verdict(row, bypassed)
        rows.append(row)
    return pd.DataFrame(rows)


def verdict(row: dict[str, Any], bypassed: bool) -> str:
    """What the numbers say of one mechanism, one of whose branches may not be used."""
    if row["swap"] < HARMLESS * row["zero"]:
        return f"little to repair: {100 * row['swap'] / row['zero']:.0f} % of what deleting costs"
    said = "repairs" if row["gap_closed"] >= REPAIRED else "does not repair"
    if row["gap_hi"] >= REPAIRED > row["gap_lo"]:
        said = "repairs in part"
    if row["repaired_lo"] > row["linear_hi"]:
        said += "; worse than a linear map"
    elif row["repaired_hi"] >= row["linear_lo"]:
        said += "; no better than a linear map"
    if row["swap_lo"] > row["zero_hi"]:
        said += "; began worse than no layer"
    return said + ("; by bypass" if bypassed else "")


def figure(frame: pd.DataFrame) -> Figure:
    """Before and after, with intervals, beside the controls."""
    picture = Figure(figsize=(7.0, 0.42 * len(frame) + 1.2), layout="constrained")
    ax = picture.subplots()
    looks = (
        ("zero", "#999999", "v", "zero: nothing there"),
        ("linear", "#009e73", "D", "linear: best linear map"),
        ("swap", "#d55e00", "o", "swapped"),
        ("repaired", "#0072b2", "o", "repaired"),
    )
    for offset, (name, colour, mark, label) in zip((-0.2, 0.2, 0.0, 0.0), looks, strict=True):
        y = [at + offset for at in range(len(frame))]
        x = frame[name]
        size = 3.5 if name in ("zero", "linear") else 6
        bars = [(x - frame[f"{name}_lo"]).clip(lower=0), (frame[f"{name}_hi"] - x).clip(lower=0)]
        ax.errorbar(
            x, y, xerr=bars, fmt=mark, color=colour, ms=size, capsize=2, lw=0.9, label=label
        )
    for at, row in enumerate(frame.itertuples()):
        ax.annotate(
            f"{100 * row.gap_closed:.0f} %",
            (1.0, at),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    ax.set_yticks(range(len(frame)), list(frame["mechanism"]))
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x", which="major", lw=0.4, color="#dddddd")
    ax.set_xlabel("KL to the teacher on held-out text, nats per token (95 % over documents)")
    ax.set_title(
        f"Layer {LAYER} of SmolLM2 replaced, then repaired; right: gap closed",
        loc="left",
        fontsize=9,
    )
    ax.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=4)
    return picture


if __name__ == "__main__":
    main()
