"""RoPE taken from one layer loses position: where, and what still carries it?

    python analyses/nope_layers.py                about 9 minutes of CPU, one thread, behind scan_atlas.py

Where: what `nope` costs text, copying and the passkey in each of SmolLM2's 30 layers, from the scan of `scan_atlas.py`,
beside the teacher's best previous-token head of that layer. What still carries it: (1) RoPE removed from layers 8, 12,
16 and 19, do they still know order (their prefix permuted), and can the position of a token still be read off their
updates and off the stream (what can be read need not be used)? (2) RoPE removed from the k layers that cost copying
most, or from all others: if a few layers carry position, the rest can do without. The layers are ranked on the scan's
random tokens, and evaluated on others. 95 % intervals: documents, sequences, prompts.
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
from scipy import stats

import mismatch
from mismatch.report import style

LAYERS = (8, 12, 16, 19)
COUNTS = (1, 4, 16)
"""Of the layers that cost copying most."""
SIZES: dict[str, Any] = {"batch_size": 8, "controls": ()}
SEED = 1
"""Of the evaluation inputs; the scan's is 0."""
TASKS = {"text": "nats per token", "induction": "nats per token", "passkey": "nats per key"}
LOOKS = {"text": ("#222222", "o"), "induction": ("#d55e00", "s"), "passkey": ("#0072b2", "^")}
FIGURES = Path(__file__).resolve().parent.parent / "figures"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=FIGURES / "nope_layers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    teacher = mismatch.load("smollm2")
    cells = pd.read_csv(FIGURES / "scan_atlas" / "cells.csv")
    where = cells[cells["student"] == "nope"][["task", "layer", "value", "lo", "hi"]]
    copying = where[where["task"] == "induction"].set_index("layer")["value"]
    ranked = [int(layer) for layer in copying.sort_values(ascending=False).index]

    heads = asked(teacher, "all:nope", ("heads",))
    previous = heads[(heads.student == "teacher") & (heads.stat == "previous")]
    best = previous.groupby("layer")["value"].max()
    local = left(teacher)
    together = pd.concat(
        [
            jointly(teacher, chosen).assign(k=k, removed=removed)
            for k in COUNTS
            for removed, chosen in (("the k", ranked[:k]), ("all others", ranked[k:]))
        ],
        ignore_index=True,
    )
    where = where.assign(best_previous=where["layer"].map(best))
    order = ranked_by_head(where)
    local.to_csv(args.output / "left.csv", index=False)
    together.to_csv(args.output / "together.csv", index=False)
    made = {
        "model": "smollm2", "ranked": ranked, "previous_token_head": order,
        "verdict": verdict(where, local, together, order), "versions": mismatch.versions(),
    }  # fmt: skip
    picture = style.to_bytes(draw(where, local, together), "png")
    (args.output / "nope_layers.png").write_bytes(picture)
    where.to_csv(args.output / "nope_layers.csv", index=False)
    (args.output / "nope_layers.json").write_text(json.dumps(made, indent=2) + "\n")
    print(local.round(4).to_string(index=False))
    print(together.round(3).to_string(index=False))
    print(made["verdict"])


def asked(
    teacher: mismatch.Teacher, swap: str, probes: tuple[str, ...], **more: Any
) -> pd.DataFrame:
    result = mismatch.probe(teacher, swap=swap, probes=probes, seed=SEED, **SIZES, **more)
    return result.table


def left(teacher: mismatch.Teacher) -> pd.DataFrame:
    """What layers and stream still know without RoPE in these four: stat, layer, site, student, value, lo, hi."""
    swap = f"layers[{','.join(map(str, LAYERS))}]:nope"
    table = asked(teacher, swap, ("order_sensitivity", "position_decoding"))
    order = table[(table.metric == "order_sensitivity") & (table.stat == "change[keep=1]")]
    read = table[(table.metric == "position_decoding") & table.stat.isin(["r2", "r2_shuffled"])]
    return pd.concat([order, read])[["stat", "layer", "site", "student", "value", "lo", "hi"]]


def jointly(teacher: mismatch.Teacher, layers: list[int]) -> pd.DataFrame:
    """task, value, lo, hi: what the model loses without RoPE in these layers."""
    swap = f"layers[{','.join(map(str, sorted(layers)))}]:nope"
    copied = asked(teacher, swap, ("induction",))
    copied = copied[copied.stat == "nll_second_minus_teacher"]
    text: dict[str, Any] = {"tokens": 1536, "seq_len": 192, "metrics": ("kl",)}
    traced = mismatch.trace(teacher, swap=swap, **text, **SIZES).table
    kl = traced[(traced.metric == "kl") & (traced.stat == "mean") & (traced.site == "logits")]
    both = {"induction": copied, "text": kl[kl.position == "all"]}
    rows = [
        found[found.student == "swap"].assign(task=task)[["task", "value", "lo", "hi"]]
        for task, found in both.items()
    ]
    return pd.concat(rows, ignore_index=True)


def ranked_by_head(where: pd.DataFrame) -> dict[str, list[float]]:
    """Per task Spearman over layers between the best previous-token head and the damage, with its interval."""
    found = {}
    for task, mine in where.groupby("task", sort=False):
        x, y = mine["best_previous"].to_numpy(), mine["value"].to_numpy()
        draws = np.random.default_rng(0).integers(0, len(mine), (2000, len(mine)))
        sampled = spearman(x[draws], y[draws])
        found[task] = [spearman(x[None], y[None])[0], *np.nanquantile(sampled, [0.025, 0.975])]
    return found


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's r of each row of two matrices `rows layers`; nan where all of a row is one number."""
    x, y = (stats.rankdata(part, axis=1) - (part.shape[1] + 1) / 2 for part in (x, y))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))


def verdict(where: pd.DataFrame, local: pd.DataFrame, together: pd.DataFrame, order: dict) -> str:
    """Where position is lost, and which of three carriers is left: the layer, the stream, the other layers."""
    said = []
    for task, unit in TASKS.items():
        mine = where[where["task"] == task]
        first, second = mine.nlargest(2, "value").itertuples()
        alone = first.lo > second.hi
        said.append(
            f"{task} {'loses most in one layer' if alone else 'has no single layer'}: {first.layer} "
            f"({style.interval(first.value, first.lo, first.hi)} {unit}), then {second.layer} "
            f"({style.interval(second.value, second.lo, second.hi)})"
        )
    swap = local[local["student"] == "swap"]
    blind = bool((swap[swap["stat"] == "change[keep=1]"]["value"] < 1e-4).all())
    read = local[(local["stat"] == "r2") & (local["site"] == "resid_post")]
    read = read.groupby("student")["value"].agg(["min", "max"])
    said.append(
        f"the layer itself {'knows no order any more' if blind else 'still knows order'}; position is still read off "
        f"the stream with R2 "
        f"{read['min']['swap']:.2f} to {read['max']['swap']:.2f} (with RoPE {read['min']['teacher']:.2f} to "
        f"{read['max']['teacher']:.2f})"
    )
    at = together.set_index(["removed", "k", "task"]).sort_index()
    enough = [
        k
        for k in sorted(set(together["k"]))
        if at.loc[("all others", k, "induction"), "hi"] < at.loc[("the k", k, "induction"), "lo"]
    ]
    said.append(
        f"RoPE in the {enough[0]} layers that copying needs most is worth more than in all others"
        if enough
        else "no few layers carry it: what the others have is needed as much"
    )
    said.append(
        "a previous-token head foretells the loss, Spearman "
        + ", ".join(f"{task} {r:.2f} [{lo:.2f}, {hi:.2f}]" for task, (r, lo, hi) in order.items())
    )
    tops = [where[where["task"] == t].nlargest(1, "value")["layer"].iloc[0] for t in TASKS]
    word = "holds in every layer" if not blind else "depends on the layer"
    word = "depends on the layer and on what is asked" if len(set(tops)) > 1 else word
    return f"RoPE -> NoPE at one layer loses position: {word}. " + "; ".join(said) + "."


@style.styled
def draw(where: pd.DataFrame, local: pd.DataFrame, together: pd.DataFrame) -> Figure:
    """Left: cost by layer. Middle: what the layer and the stream still know. Right: k layers, or all others."""
    figure = style.new_figure(style.WIDTH, 5.0)
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1), width_ratios=(0.8, 1.2))
    top = figure.add_subplot(grid[0, :])
    for task, unit in TASKS.items():
        mine, (colour, marker) = where[where["task"] == task], LOOKS[task]
        error = [mine["value"] - mine["lo"], mine["hi"] - mine["value"]]
        top.errorbar(
            mine["layer"],
            mine["value"],
            error,
            color=colour,
            marker=marker,
            ms=3.5,
            lw=0.9,
            label=f"{task}, {unit}",
        )
    heads = where[where["task"] == "text"]
    top.bar(
        heads["layer"],
        heads["best_previous"],
        color="#dddddd",
        zorder=0,
        label="best previous-token head, share",
    )
    top.set_yscale("symlog", linthresh=0.1)
    top.axhline(0, color=style.FAINT, lw=0.5)
    top.set_yticks([-0.1, 0, 0.1, 1, 10], ["-0.1", "0", "0.1", "1", "10"])
    top.minorticks_off()
    top.set(
        xlabel="the one layer without RoPE", ylabel="lost", xlim=(-0.6, where["layer"].max() + 0.6)
    )
    top.set_xticks(range(0, int(where["layer"].max()) + 1, 2))
    top.legend(frameon=False, fontsize=6.5, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
    low = figure.add_subplot(grid[1, 0])
    for stat, site, colour, marker, words in (
        ("change[keep=1]", "attn_out", "#d55e00", "o", "order, update"),
        ("r2", "attn_out", "#009e73", "s", "position, update"),
        ("r2", "resid_post", "#332288", "D", "position, stream"),
    ):
        mine = local[(local["stat"] == stat) & (local["site"] == site)]
        for student, line, face in (("teacher", "--", "white"), ("swap", "-", colour)):
            one = mine[mine["student"] == student].sort_values("layer")
            error = [one["value"] - one["lo"], one["hi"] - one["value"]]
            low.errorbar(
                one["layer"], one["value"], error, ls=line, marker=marker, ms=3.5, lw=0.8,
                color=colour, mfc=face, label=words if student == "swap" else None,
            )  # fmt: skip
    low.axhline(0, color=style.FAINT, lw=0.5)
    low.set(xlabel="layer (broken: with RoPE)", ylabel="relative change, or R2")
    low.legend(frameon=False, fontsize=6, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    right = figure.add_subplot(grid[1, 1])
    for task in ("text", "induction"):
        colour, marker = LOOKS[task]
        for removed, line, face in (("the k", "-", colour), ("all others", "--", "white")):
            mine = together[(together["task"] == task) & (together["removed"] == removed)]
            error = [mine["value"] - mine["lo"], mine["hi"] - mine["value"]]
            right.errorbar(
                mine["k"],
                mine["value"],
                error,
                ls=line,
                marker=marker,
                ms=3.5,
                lw=0.9,
                color=colour,
                mfc=face,
            )
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    style.plain_log(right.yaxis)
    right.set_xticks(COUNTS, [str(k) for k in COUNTS])
    right.minorticks_off()
    right.set(xlabel="k (full: RoPE removed there; broken: from all others)", ylabel="lost, nats")
    style.frame(
        figure,
        "RoPE taken from layers of smollm2: where it is missed, and what is left",
        "Top: one layer at a time. Left: order = relative change of the last token's update, prefix permuted; "
        "position = R2 of a ridge regression. Right: the k layers that copying misses most in the top panel, evaluated "
        "on other sequences. 95 % intervals.",
    )
    return figure


if __name__ == "__main__":
    main()
