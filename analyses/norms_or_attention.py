"""Replacing a norm is easy, replacing an attention is hard. Is it, when both are held against their controls?

    python analyses/norms_or_attention.py         about 8 minutes of CPU, one thread, behind scan_atlas.py and
                                                  update_size.py, whose cells on the same text it reads

A KL of DyT and one of Infini-attention do not compare: behind one norm hangs a whole sublayer, and layers differ by a
factor of a hundred. So each is divided by what deleting costs in the same place: a norm that gives zeros silences the
attention (norm1), the MLP (norm2) or the block (norms) behind it, and nothing else. Share = KL / KL of that. 1: no
better than nothing. Over all layers of SmolLM2, one at a time, then in all of them at once (61 norms, or 30
attentions). DyT's slope is measured on calibration text, nothing is trained. 95 % intervals: of medians by resampling
layers, of single cells over documents.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import mismatch
from mismatch.report import style

FIGURES = Path(__file__).resolve().parent.parent / "figures"
SIZES: dict[str, Any] = {"tokens": 1536, "seq_len": 192, "batch_size": 8}
"""Those of scan_atlas.py and update_size.py: the same text."""
NORMS = ("norm1:dyt", "norm2:dyt", "norms:dyt")
CASES = {
    "norm1:dyt": ("norm", "DyT for norm1", "zero"),
    "norm2:dyt": ("norm", "DyT for norm2", "mlp:zero"),
    "norms:dyt": ("norm", "DyT for both", "skip"),
    "infini(segment=64)": ("attention", "Infini-attention", "zero"),
    "sliding_window(window=64)": ("attention", "window of 64", "zero"),
    "sliding_window(window=64, sinks=1)": ("attention", "window of 64, a sink", "zero"),
    "nope": ("attention", "no RoPE", "zero"),
}
"""What is replaced, in words, and what deletes it."""
EVERYWHERE = {
    "norms:dyt": ("norm", "DyT for all 61 norms"),
    "all.norm1:dyt": ("norm", "DyT for every norm1"),
    "all:infini(segment=64)": ("attention", "Infini-attention"),
    "all:sliding_window(window=64, sinks=1)": ("attention", "window of 64, a sink"),
    "all:nope": ("attention", "no RoPE"),
    "all:zero": ("control", "all attention deleted"),
}
COLOURS = {"norm": "#009e73", "attention": "#d55e00", "control": "#0072b2"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a finished scan of DyT, instead of a new one")
    parser.add_argument("--output", type=Path, default=FIGURES / "norms_or_attention")
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher = mismatch.load("smollm2")
    if args.run is not None:
        scanned = mismatch.Scanned(mismatch.load_run(args.run))
    else:
        scanned = mismatch.scan(
            teacher, "; ".join(NORMS), tasks=("text",), controls=(), progress=True,
            run_name="norms_or_attention", **SIZES,
        )  # fmt: skip
    atlas = pd.read_csv(FIGURES / "scan_atlas" / "cells.csv")
    controls = pd.read_csv(FIGURES / "update_size" / "cells.csv")
    cells = pd.concat([atlas, controls, scanned.cells])
    found = shares(cells[cells["task"] == "text"])
    medians = summary(found)
    together = everywhere(teacher)
    args.output.mkdir(parents=True, exist_ok=True)
    medians.to_csv(args.output / "medians.csv", index=False)
    together.to_csv(args.output / "everywhere.csv", index=False)
    made = {
        "model": "smollm2", **SIZES,
        "verdict": verdict(found, medians, together),
        "versions": mismatch.versions(),
    }  # fmt: skip
    picture = style.to_bytes(draw(found, medians, together), "png")
    (args.output / "norms_or_attention.png").write_bytes(picture)
    found.to_csv(args.output / "norms_or_attention.csv", index=False)
    (args.output / "norms_or_attention.json").write_text(json.dumps(made, indent=2) + "\n")
    print(medians.round(3).to_string(index=False))
    print(together.round(3).to_string(index=False))
    print(made["verdict"])


def shares(cells: pd.DataFrame) -> pd.DataFrame:
    """student, kind, layer, kl, lo, hi, zero, share: each cell against the deletion of the same place."""
    at = cells.set_index(["student", "layer"])
    parts = []
    for student, (kind, words, control) in CASES.items():
        mine, zero = at.loc[student], at.loc[control]["value"]
        mine = mine[["value", "lo", "hi"]].rename(columns={"value": "kl"}).assign(zero=zero)
        mine["share"] = mine["kl"] / mine["zero"]
        parts.append(mine.reset_index().assign(student=student, kind=kind, words=words))
    return pd.concat(parts, ignore_index=True)


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Per student the median over layers of KL and of the share, with intervals, and the layers at or above 1."""
    rows = []
    for (student, kind), mine in found.groupby(["student", "kind"], sort=False):
        row = {"student": student, "kind": kind, "layers": len(mine)}
        draws = np.random.default_rng(0).integers(0, len(mine), (2000, len(mine)))
        for name in ("kl", "share"):
            values = mine[name].to_numpy()
            row[name] = np.median(values)
            row[f"{name}_lo"], row[f"{name}_hi"] = np.quantile(
                np.median(values[draws], axis=1), [0.025, 0.975]
            )
        row["no_better_than_nothing"] = int((mine["share"] >= 1).sum())
        rows.append(row)
    return pd.DataFrame(rows)


def everywhere(teacher: mismatch.Teacher) -> pd.DataFrame:
    """KL of the swaps of all layers at once, the same text but every prediction scored."""
    rows = []
    for swap, (kind, words) in EVERYWHERE.items():
        result = mismatch.trace(teacher, swap=swap, controls=(), metrics=("kl",), **SIZES)
        rows_of = result.table[(result.table.metric == "kl") & (result.table.stat == "mean")]
        rows_of = rows_of[(rows_of.position == "all") & (rows_of.student == "swap")]
        kl = rows_of[rows_of.site == "logits"].iloc[0]
        rows.append(
            {"swap": swap, "kind": kind, "words": words, "kl": kl.value, "lo": kl.lo, "hi": kl.hi}
        )
    return pd.DataFrame(rows)


def verdict(found: pd.DataFrame, medians: pd.DataFrame, together: pd.DataFrame) -> str:
    """Raw, against controls, and all layers at once: is the dearest norm cheaper than the cheapest attention?"""
    said = []
    for name, words in (("kl", "raw KL"), ("share", "share of what deleting costs")):
        norm, attention = (medians[medians["kind"] == kind] for kind in ("norm", "attention"))
        span = [
            f"{style.number(part[name].min())} to {style.number(part[name].max())}"
            for part in (norm, attention)
        ]
        said.append(
            f"{words}: {_order(norm, attention, name)} (medians over layers, norms {span[0]}, attention {span[1]})"
        )
    pairs = _wins(found)
    whole = together[together["kind"] != "control"].rename(columns={"lo": "kl_lo", "hi": "kl_hi"})
    norm, attention = (whole[whole["kind"] == kind] for kind in ("norm", "attention"))
    said.append(
        f"all layers at once: {_order(norm, attention, 'kl')} (norms {style.number(norm['kl'].min())} to "
        f"{style.number(norm['kl'].max())}, attention {style.number(attention['kl'].min())} to "
        f"{style.number(attention['kl'].max())} nats)"
    )
    return (
        "Norms are easier than attention. " + "; ".join(said)
        + f". DyT for norm1 is cheaper than Infini-attention in the same layer in {pairs[0]} of {pairs[1]} layers."
    )  # fmt: skip


def _order(norm: pd.DataFrame, attention: pd.DataFrame, name: str) -> str:
    """Holds: every norm's interval is below every attention's. Does not: none is below any. Else it depends."""
    below = [a > b for a in attention[f"{name}_lo"] for b in norm[f"{name}_hi"]]
    return (
        "holds" if all(below) else "does not hold" if not any(below) else "depends on the mechanism"
    )


def _wins(found: pd.DataFrame) -> tuple[int, int]:
    kl = found.pivot_table(index="layer", columns="student", values="kl")
    return int((kl["norm1:dyt"] < kl["infini(segment=64)"]).sum()), len(kl)


@style.styled
def draw(found: pd.DataFrame, medians: pd.DataFrame, together: pd.DataFrame) -> Figure:
    """Left: every layer's share and its median. Middle: raw KL. Right: all layers at once."""
    figure = style.new_figure(style.WIDTH, 3.2)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.05))
    order = list(CASES)[::-1]
    rng = np.random.default_rng(0)
    for ax, name, title, unit in (
        (left, "kl", "one layer", "KL, nats per token"),
        (middle, "share", "one layer, against its control", "share of what deleting costs"),
    ):
        for at, student in enumerate(order):
            mine = found[found["student"] == student]
            height = at + rng.uniform(-0.2, 0.2, len(mine))
            colour = COLOURS[CASES[student][0]]
            ax.scatter(mine[name], height, s=6, color=colour, alpha=0.45, lw=0)
            row = medians[medians["student"] == student].iloc[0]
            ax.plot([row[f"{name}_lo"], row[f"{name}_hi"]], [at, at], color=style.INK, lw=2.2)
            ax.plot([row[name]], [at], "o", color="white", mec=style.INK, ms=4.5, zorder=4)
        ax.set(xscale="log", xlabel=unit, yticks=range(len(order)))
        ax.set_title(title, fontweight="bold")
    left.set_xticks([1e-4, 0.01, 1])
    middle.set_xticks([1e-3, 0.01, 0.1, 1])
    left.set_yticklabels([CASES[name][1] for name in order])
    middle.set_yticklabels([])
    middle.axvline(1, color=COLOURS["control"], lw=0.8, ls="--")
    whole = together[::-1].reset_index(drop=True)
    for at, row in whole.iterrows():
        error = [[row.kl - row.lo], [row.hi - row.kl]]
        right.errorbar([row.kl], [at], xerr=error, fmt="o", ms=4.5, lw=1.2, color=COLOURS[row.kind])
        right.annotate(row.words, (0.04, at + 0.22), fontsize=6.5, color=COLOURS[row.kind])
    right.set(xscale="log", xlabel="KL, nats per token", xlim=(0.03, 20), yticks=[])
    right.set(xticks=[0.1, 1, 10], ylim=(-0.5, len(whole) - 0.3))
    right.set_title("all layers at once", fontweight="bold")
    style.plain_log(*(ax.xaxis for ax in (left, middle, right)))
    style.frame(
        figure,
        "Is a norm easier to replace than an attention? (smollm2)",
        "Dots: layers, one replaced at a time; rings: medians, 95 % interval over layers. Broken line: no better than "
        "deleting what hangs on it (attention, MLP or block). Right: 95 % intervals over documents.",
    )
    return figure


if __name__ == "__main__":
    main()
