"""One layer replaced, several, all: does the damage add up, and does repairing them one after the other scale?

    python analyses/one_or_all.py                about 16 minutes of CPU, one thread; goes on where it was stopped
    python analyses/one_or_all.py --only infini  one mechanism's damage; --only repair  the repairs
    python analyses/one_or_all.py --draw         only the picture, from what is there

Damage: Infini-attention, linear attention with and without a window, and no attention at all, in each of SmolLM2's 30
layers alone and in 2, 4, 8, 16 evenly spaced layers (two sets of each size) and in all 30, one pass of the teacher for
all, the text and the predictions of `scan_atlas.py`. The number is KL together / sum of the KLs alone, both of the same
documents, resampled together: 1 is additive. It is what errors that do not know of each other would give, because KL
grows with the square of a small error; errors that point the same way give more, and where the prediction is lost
already there is little left to lose.
Repair: four layers with Infini-attention, each repaired alone, then all of them in depth order (each on the stream of
the student as repaired so far), closed form and local, the same small text for each.
Writes figures/one_or_all/: KL per document of each mechanism, ratios.csv, repairs.csv, one_or_all.{json,png}.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import mismatch
from mismatch import spec
from mismatch.metrics.base import PerDocument
from mismatch.report import style
from mismatch.stages.scan.batches import measure, prove_restored
from mismatch.stages.scan.cells import joint
from mismatch.stages.scan.config import ScanConfig
from mismatch.stages.scan.stage import sweep_of
from mismatch.stages.scan.tasks import text_task
from mismatch.texts.documents import calibration_and_evaluation

N_LAYERS = 30
MECHANISMS = {
    "infini": ("infini(segment=64)", "Infini-attention", "#d55e00", "o"),
    "linear": ("linear_attention", "linear attention", "#a6761d", "s"),
    "hybrid": ("linear_attention(window=64, sinks=1)", "the same, window and sink", "#009e73", "D"),
    "zero": ("zero", "attention deleted", "#0072b2", "v"),
}
NUMBERS = (2, 4, 8, 16, N_LAYERS)
FEW = 8
SHIFTS = (0.25, 0.75)
"""Where a set begins, in its own spacing."""
SIZES: dict[str, Any] = {
    "tokens": 1536,
    "seq_len": 192,
    "batch_size": 8,
    "calibration_tokens": 2048,
}
REPAIRED = (5, 13, 20, 28)
"""A set of four of the above."""
REPAIR: dict[str, Any] = {
    "train_tokens": 8192,
    "self_generated": 0.0,
    "seq_len": 256,
    "tokens": 2048,
    "val_tokens": 1024,
    "epochs": 2,
}
HERE = Path(__file__).resolve().parent.parent / "figures" / "one_or_all"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=[*MECHANISMS, "repair"], help="one part")
    parser.add_argument("--draw", action="store_true", help="only the picture")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    files = {name: args.output / f"{name}.csv" for name in MECHANISMS}
    repairs = args.output / "repairs.csv"
    if not args.draw:
        teacher = mismatch.load("smollm2")
        for name in [args.only] if args.only else MECHANISMS:
            if name in files and not files[name].exists():
                documents(teacher, MECHANISMS[name][0]).to_csv(files[name], index=False)
        if args.only in (None, "repair"):
            repair(teacher, repairs)
    found = pd.concat(
        [ratios(pd.read_csv(file)).assign(name=n) for n, file in files.items() if file.exists()]
    )
    repairs = pd.read_csv(repairs, dtype={"layers": str}) if repairs.exists() else pd.DataFrame()
    made = {
        "model": "smollm2", **SIZES, "sets": {k: sets(k) for k in NUMBERS}, "repair": REPAIR,
        "verdict": [*verdict(found), *([] if repairs.empty else [repair_verdict(repairs)])],
        "versions": mismatch.versions(),
    }  # fmt: skip
    found.to_csv(args.output / "ratios.csv", index=False)
    (args.output / "one_or_all.png").write_bytes(style.to_bytes(draw(found, repairs), "png"))
    (args.output / "one_or_all.json").write_text(json.dumps(made, indent=2) + "\n")
    print(found[found["layers"] == "pooled"].round(4).to_string(index=False))
    print("\n".join(made["verdict"]))


def sets(k: int) -> list[tuple[int, ...]]:
    """Sets of `k` evenly spaced layers; only one holds all."""
    found = [tuple(int((i + shift) * N_LAYERS / k) for i in range(k)) for shift in SHIFTS]
    return list(dict.fromkeys(found))


def swap_of(layers: tuple[int, ...], mechanism: str) -> str:
    return f"layers[{','.join(map(str, layers))}]:{mechanism}"


# ---- damage -----------------------------------------------------------------------------------------


def documents(teacher: mismatch.Teacher, mechanism: str) -> pd.DataFrame:
    """layers, k, document, kl, n: sums over the scored predictions of a document, each layer alone and each set."""
    config: Any = ScanConfig(model="smollm2", swap=(mechanism,), **SIZES)
    places = [(layer,) for layer in range(N_LAYERS)] + [s for k in NUMBERS for s in sets(k)]
    texts = {swap_of(layers, mechanism): layers for layers in places}
    made = {
        joint(text, spec.check(spec.parse(text)), teacher.layout): layers
        for text, layers in texts.items()
    }
    every = tuple(sorted(made, key=lambda cell: cell.first))
    set_from, held_out = calibration_and_evaluation(config.calibration_data, config.data)
    cut = mismatch.windows(held_out, teacher.tokenizer, config.seq_len, config.tokens, config.seed)
    length, tokens = min(config.seq_len, config.calibration_tokens), config.calibration_tokens
    calibration = mismatch.windows(set_from, teacher.tokenizer, length, tokens, config.seed)
    task = text_task(cut, config.scored, config.seed)
    sweep = sweep_of(teacher, config, every, calibration)
    with tqdm(total=len(every), unit="run", desc=mechanism) as bar:
        sums = measure(sweep, every, [task], batch_tokens=cut.tokens, progress=bar.update)
    prove_restored(sweep)
    rows = []
    for cell, layers in made.items():
        part = sums.part(cell, task, "kl")
        kl = part.sums[part.columns.index("kl")].sum(1)
        rows += [
            (" ".join(map(str, layers)), len(layers), document, value, n)
            for document, (value, n) in enumerate(zip(kl, part.counts.sum(1), strict=True))
        ]
    return pd.DataFrame(rows, columns=["layers", "k", "document", "kl", "n"])


def ratios(found: pd.DataFrame) -> pd.DataFrame:
    """Per set, and pooled over the sets of a size: k, layers, together and alone (nats per token), ratio, lo, hi."""
    kl = found.pivot_table(index="document", columns="layers", values="kl")
    n = found.groupby("document")["n"].first().to_numpy(float)
    rows = []
    for k in NUMBERS:
        names = [name for name in found.loc[found["k"] == k, "layers"].unique()]
        pairs = [(kl[name].to_numpy(), kl[name.split()].to_numpy().sum(axis=1)) for name in names]
        pooled = tuple(np.mean(side, axis=0) for side in zip(*pairs, strict=True))
        for name, (together, alone) in [*zip(names, pairs, strict=True), ("pooled", pooled)]:
            ratio, lo, hi = PerDocument(together, n).over(PerDocument(alone, n))[:3]
            rows.append(
                {
                    "k": k, "layers": name, "together": together.sum() / n.sum(),
                    "alone": alone.sum() / n.sum(), "ratio": ratio,
                    "lo": lo, "hi": hi,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def verdict(found: pd.DataFrame) -> list[str]:
    """Additive where the interval holds 1; over the sizes of a mechanism, and over mechanisms, the control apart."""
    said, every = [], []
    pooled = found[found["layers"] == "pooled"]
    for name, mine in pooled.groupby("name", sort=False):
        words = [_word(row) for row in mine.itertuples()]
        every += words if name != "zero" else []
        spans = ", ".join(
            f"{row.k} layers {row.ratio:.2f} [{row.lo:.2f}, {row.hi:.2f}] {word}"
            for row, word in zip(mine.itertuples(), words, strict=True)
        )
        said.append(f"{MECHANISMS[name][1]}: {spans}")
    kinds = set(every)
    answer = (
        "holds" if kinds == {"additive"}
        else "does not hold" if "additive" not in kinds
        else "depends on mechanism and number"
    )  # fmt: skip
    swaps = pooled[pooled["name"] != "zero"]
    ranges = [
        f"{side['ratio'].min():.2f} to {side['ratio'].max():.2f}"
        for side in (swaps[swaps["k"] <= FEW], swaps[swaps["k"] > FEW])
    ]
    return [
        f"KL together is the sum of the KLs alone: {answer}. Together / sum is {ranges[0]} up to {FEW} layers, "
        f"{ranges[1]} beyond:",
        *said,
    ]


def _word(row: Any) -> str:
    return "more" if row.lo > 1 else "less" if row.hi < 1 else "additive"


# ---- repair -----------------------------------------------------------------------------------------


def repair(teacher: mismatch.Teacher, file: Path) -> None:
    """The repairs that the file has not yet, each written when it is done."""
    rows = pd.read_csv(file, dtype={"layers": str}).to_dict("records") if file.exists() else []
    done = {row["layers"] for row in rows}
    with tempfile.TemporaryDirectory(prefix="mismatch-") as store:
        for layers in [*((layer,) for layer in REPAIRED), REPAIRED]:
            if (name := " ".join(map(str, layers))) not in done:
                rows.append({"layers": name, "k": len(layers)} | _repair(teacher, layers, store))
                pd.DataFrame(rows).to_csv(file, index=False)


def _repair(teacher: mismatch.Teacher, layers: tuple[int, ...], store: str) -> dict[str, Any]:
    started = time.process_time()
    plan = mismatch.repair(
        teacher, swap_of(layers, MECHANISMS["infini"][0]), stages=("closed-form", "local"), max_minutes=None,
        min_gain=0.0, trace_tokens=0, probes=(), controls=("zero",), activations_dir=store, progress=True, **REPAIR,
    ).plan  # fmt: skip
    students = plan.students
    row: dict[str, Any] = {}
    for name, student in (("before", "swap"), ("after", "repaired"), ("zero", "zero")):
        row[name], row[f"{name}_lo"], row[f"{name}_hi"] = students[student].kl
    row["gap_closed"], row["gap_lo"], row["gap_hi"] = students["repaired"].gap_closed
    row["after_closed_form"] = plan.stages[1].kl
    row["cpu_seconds"] = time.process_time() - started
    return row


def alone(repairs: pd.DataFrame) -> pd.Series:
    """The single repairs added up. The ends of the gap are those of all layers at once: too wide, not too narrow."""
    one = repairs[repairs["k"] == 1]
    total = one[["before", "after", "zero"]].sum()
    total["gap_closed"] = 1 - total["after"] / total["before"]
    for end in ("gap_lo", "gap_hi"):
        total[end] = (one[end] * one["before"]).sum() / total["before"]
    return total


def repair_verdict(repairs: pd.DataFrame) -> str:
    """Does repairing several in turn close as much of the gap as repairing each alone?"""
    several = repairs[repairs["k"] > 1]
    if several.empty:
        return "Sequential repair scales: not measured yet."
    one, parts, words = alone(repairs), [], set()
    for row in several.itertuples():
        word = (
            "as much" if row.gap_lo <= one["gap_hi"] and row.gap_hi >= one["gap_lo"]
            else "more" if row.gap_lo > one["gap_hi"] else "less"
        )  # fmt: skip
        words.add(word)
        parts.append(
            f"{row.k} together {row.before:.3f} -> {style.interval(row.after, row.after_lo, row.after_hi)} nats, gap "
            f"closed {row.gap_closed:.0%} [{row.gap_lo:.0%}, {row.gap_hi:.0%}] ({word})"
        )
    answer = (
        "does not hold"
        if words == {"less"}
        else "depends on the number"
        if "less" in words
        else "holds"
    )
    return (
        f"Sequential repair scales to {several['k'].max()} layers: {answer}. Alone, summed over "
        f"{(repairs['k'] == 1).sum()}: "
        f"{one['before']:.3f} -> {one['after']:.3f} nats, {one['gap_closed']:.0%} "
        f"[{one['gap_lo']:.0%}, {one['gap_hi']:.0%}]; {'; '.join(parts)}."
    )


# ---- picture ----------------------------------------------------------------------------------------


@style.styled
def draw(found: pd.DataFrame, repairs: pd.DataFrame) -> Figure:
    """KL together and summed, their ratio, and the repairs."""
    figure = style.new_figure(style.WIDTH, 3.1)
    left, middle, right = figure.subplots(1, 3)
    for at, name in enumerate(found["name"].unique()):
        _, words, colour, mark = MECHANISMS[name]
        mine = found[found["name"] == name]
        pooled, each = mine[mine["layers"] == "pooled"], mine[mine["layers"] != "pooled"]
        left.plot(
            pooled["k"],
            pooled["together"],
            "-",
            marker=mark,
            ms=3.5,
            lw=1.2,
            color=colour,
            label=words,
        )
        left.plot(pooled["k"], pooled["alone"], ":", lw=1.2, color=colour)
        shift = 1 + 0.05 * (at - 1.5)
        error = [pooled["ratio"] - pooled["lo"], pooled["hi"] - pooled["ratio"]]
        middle.errorbar(
            pooled["k"] * shift,
            pooled["ratio"],
            error,
            fmt="-" + mark,
            ms=3.5,
            lw=1.1,
            color=colour,
        )
        middle.scatter(each["k"] * shift, each["ratio"], s=9, fc="none", ec=colour, lw=0.6)
    for ax in (left, middle):
        ax.set(xscale="log", yscale="log", xlabel="layers replaced")
        ax.set_xticks(NUMBERS, [str(k) for k in NUMBERS])
        ax.minorticks_off()
    middle.axhline(1, color=style.INK, lw=0.7, ls="--")
    middle.set(ylim=(0.65, 3.2), yticks=[0.8, 1, 1.5, 2], yticklabels=["0.8", "1", "1.5", "2"])
    left.set_ylabel("KL, nats per token")
    left.set_yticks([0.03, 0.1, 0.3, 1, 3, 10])
    style.plain_log(left.yaxis)
    left.set_title("together (full), summed (dotted)", fontweight="bold")
    middle.set_title("together / sum of alone", fontweight="bold")
    middle.legend(frameon=False, fontsize=6.5, loc="upper left", handles=left.get_lines()[::2])
    _repairs(right, repairs)
    style.frame(
        figure,
        "One layer replaced, several, all: does damage add up, does repair? (smollm2)",
        "Left and middle: evenly spaced layers, two sets of each size (rings in the middle) pooled (marks); bars: 95 % "
        "over 8 documents, together and alone resampled alike (few: too narrow). Right: Infini-attention in layers "
        f"{', '.join(map(str, REPAIRED))}, repaired alone and in depth order; below: what is closed of the gap. "
        "The sum has no interval of its own.",
    )
    return figure


def _repairs(ax: Axes, repairs: pd.DataFrame) -> None:
    """Before and after of each layer alone, of their sum, and of sets together."""
    ax.set_title("Infini-attention, repaired", fontweight="bold")
    if repairs.empty:
        ax.set_axis_off()
        return
    rows = [(f"{row.layers}", row._asdict()) for row in repairs[repairs["k"] == 1].itertuples()]
    rows.append(("sum", alone(repairs).to_dict()))
    rows += [(f"all {row.k}", row._asdict()) for row in repairs[repairs["k"] > 1].itertuples()]
    looks = (
        ("zero", "#777777", "v", "attention deleted", -0.2),
        ("before", "#d55e00", "o", "as it starts", 0.0),
        ("after", "#0072b2", "o", "repaired", 0.2),
    )
    for name, colour, mark, words, shift in looks:
        face = "white" if name == "before" else colour
        for x, (_, row) in enumerate(rows):
            ends = [row.get(f"{name}_{end}", row[name]) for end in ("lo", "hi")]
            ax.plot([x + shift] * 2, ends, color=colour, lw=1)
            label = None if x else words
            ax.plot(x + shift, row[name], mark, ms=4, color=colour, mfc=face, label=label)
    ax.axvline((repairs["k"] == 1).sum() - 0.5, color=style.FAINT, lw=0.4)
    for x, (_, row) in enumerate(rows):
        ax.annotate(
            f"{100 * row['gap_closed']:.0f} %", (x, 0.02), xycoords=("data", "axes fraction"), ha="center",
            fontsize=6,
        )  # fmt: skip
    ax.set(
        yscale="log",
        ylim=(0.0045, 5),
        xlim=(-0.6, len(rows) - 0.4),
        xlabel="layer alone, and several",
    )
    ax.set_yticks([0.01, 0.03, 0.1, 0.3, 1])
    ax.set_xticks(range(len(rows)), [label for label, _ in rows])
    ax.minorticks_off()
    style.plain_log(ax.yaxis)
    ax.legend(frameon=False, fontsize=6, loc="upper left")


if __name__ == "__main__":
    main()
