"""Which layers of SmolLM2-135M can be taken out, and is it those that a paper found?

    python analyses/layer_removal.py              about 7 minutes of CPU, one thread

arXiv 2603.19348 removes each layer of SmolLM2-135M: layers 8-11 are its critical core, and without layer 14 or 17 the
text is predicted better. Here every block is skipped, one at a time, and beside it only its attention deleted, on
held-out Wikipedia: what the text's own loss rises by (nats per token; below 0: removal helps), with its interval over
documents. The weights are those of the Instruct model, dequantised from 4 bits, so sizes need not agree; order may.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

import mismatch

SWAPS = {"skip": "whole block skipped", "zero": "attention deleted"}
COLOURS = {"skip": "#d55e00", "zero": "#0072b2"}
CORE, HELPED = (8, 9, 10, 11), (14, 17)
"""Layers of the paper: critical, and those whose removal helps."""
HERE = Path(__file__).resolve().parent.parent / "figures" / "layer_removal"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="what to take layers out of")
    parser.add_argument("--tokens", type=int, default=3072, help="of the text, in windows of 192")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    given = {"tokens": args.tokens, "seq_len": 192, "scored": 0.5, "batch_size": 8}
    scanned = mismatch.scan(
        args.model, "; ".join(SWAPS), tasks=("text",), controls=(), progress=True, **given
    )
    found = losses(scanned.table)
    args.output.mkdir(parents=True, exist_ok=True)
    found.to_csv(args.output / "removal.csv", index=False)
    text = scanned.run.manifest["texts"]["evaluation"]
    draw(found, args.model, text).savefig(args.output / "removal.png", dpi=200)
    made = {"model": args.model, **given, "text": text, "versions": mismatch.versions()}
    (args.output / "removal.json").write_text(json.dumps(made, indent=2) + "\n")
    print(found.to_string(index=False))
    print(verdict(found))


def losses(table: pd.DataFrame) -> pd.DataFrame:
    """What each removal does to the text's own loss: removed, layer, value, lo, hi, rank (1 = dearest)."""
    rows = table[(table.metric == "nll") & (table.stat == "mean") & (table.position == "all")]
    found = rows[["student", "layer", "value", "lo", "hi", "n"]].rename(
        columns={"student": "removed", "value": "nll_rise"}
    )
    found["rank"] = found.groupby("removed")["nll_rise"].rank(ascending=False).astype(int)
    return found.sort_values(["removed", "layer"]).reset_index(drop=True)


def verdict(found: pd.DataFrame) -> str:
    """Two sentences a removal: where the paper's layers stand among all, and which removals help."""
    lines = []
    for removed, words in SWAPS.items():
        mine = found[found.removed == removed].set_index("layer")
        ranks = ", ".join(f"{layer}: {mine['rank'][layer]}" for layer in (*CORE, *HELPED))
        helps = [str(layer) for layer in mine.index[mine.hi < 0]]
        lines.append(
            f"{words}: ranks of {len(mine)} (1 = dearest) {ranks}; "
            f"helps in layers: {', '.join(helps) or 'none'}"
        )
    return "\n".join(lines)


def draw(found: pd.DataFrame, model: str, text: dict) -> Figure:
    """Loss against layer, both removals, the paper's layers shaded."""
    figure = Figure(figsize=(7, 3.1), layout="constrained")
    ax = figure.subplots()
    ax.axvspan(CORE[0] - 0.5, CORE[-1] + 0.5, color="#f3e3d3", lw=0, label="paper: critical core")
    for layer in HELPED:
        label = "paper: removal helps" if layer == HELPED[0] else None
        ax.axvspan(layer - 0.5, layer + 0.5, color="#d9e8f3", lw=0, label=label)
    for shift, (removed, words) in zip((-0.12, 0.12), SWAPS.items(), strict=True):
        mine = found[found.removed == removed]
        error = [mine.nll_rise - mine.lo, mine.hi - mine.nll_rise]
        ax.errorbar(
            mine.layer.astype(float) + shift, mine.nll_rise, error, fmt="o", ms=3.5, lw=1,
            color=COLOURS[removed], label=words,
        )  # fmt: skip
    ax.axhline(0, color="black", lw=0.6)
    ax.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    ax.set_ylim(min(-0.03, 1.2 * found.lo.min()), 1.5 * found.hi.max())
    ax.set_yticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
    ax.minorticks_off()
    ax.set_xticks(range(0, int(found.layer.max()) + 1, 2))
    ax.set(
        xlabel="layer that is removed, alone",
        ylabel="rise of the text's loss\n(nats per token)",
        xlim=(-0.7, found.layer.max() + 0.7),
    )
    ax.set_title(
        f"{model}, one layer removed at a time ({text['tokens']} tokens of {text['documents']} "
        "documents, 95 % intervals)",
        fontsize=9, loc="left",
    )  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=7.5, frameon=False, ncols=4, loc="outside lower center")
    return figure


if __name__ == "__main__":
    main()
