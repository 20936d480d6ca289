"""Parallel addition with alpha = 0 keeps the model. How far can alpha go before it hurts?

    python analyses/parallel_alpha.py             about 20 minutes of CPU, one thread; each mechanism is a run of
    python analyses/parallel_alpha.py --only random      its own, and one that is finished is read from its folder

`parallel(X, alpha)` keeps a layer's attention and adds alpha times X: Infini-attention and Mamba-2 (which inherit the
original's projections), attention with random weights, and `identity`, the attention itself once more, which only
changes the size of its update (alpha = -1 deletes it). Layers 4, 12 and 20 of SmolLM2, KL on ordinary text. The mark is
0.01 nats: `crossings` holds the alpha at which KL passes it, between two alphas of the grid on a straight line in
logarithms, with the alphas at which the ends of KL's 95 % interval pass it. Beside it: X in place of the attention, and
the attention deleted.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import mismatch
from mismatch import spec
from mismatch.report import style

INNERS = {
    "infini(segment=64)": ("Infini-attention", "#d55e00"),
    "mamba2": ("Mamba-2", "#009e73"),
    "random": ("random weights", "#7a5195"),
    "identity": ("itself again", "#56b4e9"),
}
ALPHAS = (0.01, 0.0316, 0.1, 0.316, 1.0, 3.16)
FINE = ("infini(segment=64)", "random")
"""On the whole grid; the others without its ends."""
LAYERS = "4,12,20"
MARK = 0.01
"""Nats per token: what counts as hurt. A window of 64 with a sink costs less than this in every layer."""
SIZES: dict[str, Any] = {"tokens": 1536, "seq_len": 192, "batch_size": 8}
HERE = Path(__file__).resolve().parent.parent / "figures" / "parallel_alpha"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = {name.partition("(")[0]: name for name in INNERS}
    parser.add_argument("--only", choices=names, help="one mechanism, in this process")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the scans are kept")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for short in [args.only] if args.only else names:
        folder = args.runs / f"parallel_alpha-{short}"
        if not (folder / "metrics.parquet").exists():
            mismatch.scan(
                "smollm2", swaps(names[short]), among=LAYERS, tasks=("text",), progress=True,
                controls=("zero",), output=str(folder), **SIZES,
            )  # fmt: skip
    folders = {name: args.runs / f"parallel_alpha-{short}" for short, name in names.items()}
    runs = {
        name: mismatch.Scanned(mismatch.load_run(folder))
        for name, folder in folders.items()
        if (folder / "metrics.parquet").exists()
    }
    found = pd.concat([readings(run.cells, name) for name, run in runs.items()], ignore_index=True)
    crossed = crossings(found)
    made = {
        "model": "smollm2",
        **SIZES,
        "mark": MARK,
        "crossings": crossed.to_dict("records"),
        "verdict": verdict(found, crossed),
        "text": next(iter(runs.values())).run.manifest["texts"]["evaluation"],
        "versions": mismatch.versions(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "crossings.csv").write_text(crossed.to_csv(index=False))
    picture = style.to_bytes(draw(found), "png")
    (args.output / "parallel_alpha.png").write_bytes(picture)
    found.to_csv(args.output / "parallel_alpha.csv", index=False)
    (args.output / "parallel_alpha.json").write_text(json.dumps(made, indent=2) + "\n")
    print(crossed.round(4).to_string(index=False))
    print(made["verdict"])


def grid(inner: str) -> tuple[float, ...]:
    alphas = ALPHAS if inner in FINE else ALPHAS[1:-1]
    return (0.0, *(sign * alpha for sign in (1, -1) for alpha in alphas))


def swaps(inner: str) -> list[str]:
    """The columns of one scan: beside the original at every alpha, and in its place."""
    beside = [f"parallel({inner}, alpha={alpha})" for alpha in grid(inner)]
    return beside if inner == "identity" else [*beside, inner]


def readings(cells: pd.DataFrame, inner: str) -> pd.DataFrame:
    """inner, how (beside, replaced, zero), alpha, layer, value, lo, hi: KL in nats per token."""
    named = {
        str(spec.templates(text)[0]): alpha
        for text, alpha in zip(swaps(inner), grid(inner), strict=False)
    }
    mine = cells[cells["kind"] != "missing"]
    mine = mine[["student", "layer", "value", "lo", "hi"]].assign(inner=inner)
    mine["alpha"] = mine["student"].map(named)
    mine["how"] = mine["student"].map(
        {**dict.fromkeys(named, "beside"), inner: "replaced", "zero": "zero"}
    )
    return mine.drop(columns="student")


def crossing(alphas: pd.Series, values: pd.Series) -> float:
    """The |alpha| at which KL first passes the mark; inf: nowhere on the grid; 0: at its first point already."""
    points = sorted(zip(alphas.abs(), values, strict=True))
    last = None
    for alpha, value in points:
        if value >= MARK:
            if last is None:
                return 0.0
            (a, b), (x, y) = last, (alpha, value)
            if b <= 0:
                return x
            share = (math.log(MARK) - math.log(b)) / (math.log(y) - math.log(b))
            return math.exp(math.log(a) + share * (math.log(x) - math.log(a)))
        last = (alpha, value)
    return math.inf


def crossings(found: pd.DataFrame) -> pd.DataFrame:
    """inner, layer, sign: alpha at the mark with its interval, the power of alpha that KL begins with, other KLs."""
    rows = []
    for (inner, layer), mine in found.groupby(["inner", "layer"], sort=False):
        beside = mine[mine["how"] == "beside"]
        one = {how: mine[mine["how"] == how]["value"] for how in ("replaced", "zero")}
        for sign in (1, -1):
            side = beside[beside["alpha"] * sign > 0]
            (a, x), (b, y) = sorted(zip(side["alpha"].abs(), side["value"], strict=True))[:2]
            at = {bound: crossing(side["alpha"], side[bound]) for bound in ("value", "hi", "lo")}
            rows.append(
                {
                    "inner": inner, "layer": layer, "sign": "+" if sign > 0 else "-",
                    "alpha": at["value"], "lo": at["hi"], "hi": at["lo"],
                    "power": math.log(y / x) / math.log(b / a),
                    "kl_at_0": float(beside.loc[beside["alpha"] == 0, "value"].iloc[0]),
                    "kl_at_1": float(side.loc[side["alpha"].abs() == 1, "value"].iloc[0]),
                    "kl_replaced": float(one["replaced"].iloc[0]) if len(one["replaced"]) else math.nan,
                    "kl_zero": float(one["zero"].iloc[0]),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def verdict(found: pd.DataFrame, crossed: pd.DataFrame) -> str:
    """Exactly 0 at alpha = 0 or not; and whether one alpha can be named for all mechanisms and layers."""
    start = found[(found["how"] == "beside") & (found["alpha"] == 0)]
    exact = int((start[["value", "lo", "hi"]] == 0).all(axis=1).sum())
    keeps = "holds" if exact == len(start) else "does not hold"
    apart = crossed["lo"].max() > crossed["hi"].min()
    by = {
        inner: f"{style.number(mine['alpha'].min())} to {style.number(mine['alpha'].max())}"
        for inner, mine in crossed.groupby("inner", sort=False)
    }
    safe = crossed["lo"].min()
    words = "depends on mechanism and layer" if apart else "is the same everywhere within intervals"
    each = "; ".join(f"{inner} {span}" for inner, span in by.items())
    both = crossed.dropna(subset="kl_replaced")
    both = both[both["sign"] == "+"]
    less = int((both["kl_at_1"] < both["kl_replaced"]).sum())
    return (
        f"alpha = 0 keeps the model: {keeps} (KL exactly 0 in {exact} of {len(start)} cells). "
        f"How far alpha can go before KL passes {MARK:g} nats {words}: {each}; below {style.number(safe)} nowhere. "
        f"KL grows as alpha to the {crossed['power'].min():.2f} to {crossed['power'].max():.2f} at first. "
        f"Added in full (alpha = 1) it costs less than in place of the attention in {less} of {len(both)} cells."
    )


@style.styled
def draw(found: pd.DataFrame) -> Figure:
    """KL against |alpha|, a panel a layer; full lines add, broken lines subtract; at the right what replacing costs."""
    figure = style.new_figure(style.WIDTH, 3.1)
    layers = sorted(found["layer"].unique())
    axes = figure.subplots(1, len(layers), sharey=True)
    for ax, layer in zip(axes, layers, strict=True):
        ax.axhline(MARK, color=style.INK, lw=0.6, ls=":")
        for inner in found["inner"].unique():
            colour = INNERS[inner][1]
            mine = found[(found["layer"] == layer) & (found["inner"] == inner)]
            for sign, line, face in ((1, "-", colour), (-1, "--", "white")):
                side = mine[(mine["how"] == "beside") & (mine["alpha"] * sign > 0)]
                side = side.assign(alpha=side["alpha"].abs()).sort_values("alpha")
                ax.plot(
                    side["alpha"],
                    side["value"],
                    line,
                    color=colour,
                    marker="o",
                    ms=2.5,
                    lw=1,
                    mfc=face,
                )
                ax.fill_between(
                    side["alpha"], side["lo"], side["hi"], color=colour, alpha=0.15, lw=0
                )
            place = mine[mine["how"] == "replaced"]
            error = [place["value"] - place["lo"], place["hi"] - place["value"]]
            ax.errorbar(
                [7.0] * len(place), place["value"], error, fmt="D", ms=4, color=colour, lw=1
            )
        zero = found[(found["layer"] == layer) & (found["how"] == "zero")].iloc[0]
        ax.plot([7.0], [zero["value"]], "s", ms=4, color="#0072b2")
        ax.axvline(4.7, color=style.FAINT, lw=0.4)
        ax.set(xscale="log", yscale="log", xlim=(0.007, 10), ylim=(3e-7, 20))
        ax.set_xticks([0.01, 0.1, 1, 7], ["0.01", "0.1", "1", "in its\nplace"])
        ax.minorticks_off()
        ax.set_title(f"layer {layer}", fontweight="bold")
        ax.set_xlabel("|alpha|")
    axes[0].set_ylabel("KL, nats per token")
    axes[0].annotate(f"mark: {MARK:g}", (0.0075, MARK * 1.25), fontsize=6, color=style.FAINT)
    style.plain_log(axes[0].yaxis)
    there = [INNERS[inner] for inner in found["inner"].unique()]
    lines = [Line2D([], [], color=colour, lw=1.4, label=words) for words, colour in there]
    signs = [
        Line2D([], [], color=style.INK, lw=1, marker="o", ms=3, label="added"),
        Line2D([], [], color=style.INK, lw=1, ls="--", marker="o", mfc="white", ms=3, label="taken away"),
        Line2D([], [], color=style.INK, lw=0, marker="D", ms=4, label="in its place"),
        Line2D([], [], color="#0072b2", lw=0, marker="s", ms=4, label="attention deleted"),
    ]  # fmt: skip
    for ax, keys in ((axes[0], lines), (axes[1], signs)):
        ax.legend(
            handles=keys, frameon=False, fontsize=6, loc="lower right", bbox_to_anchor=(0.88, 0)
        )
    style.frame(
        figure,
        "How much of another mechanism can be added to an attention (smollm2)",
        "Full lines: alpha times the mechanism is added; broken: taken away. Bands: 95 % over documents. alpha = 0 "
        "reads exactly 0 and has no place on this axis.",
    )
    return figure


if __name__ == "__main__":
    main()
