"""What does each mechanism of the table do to one layer of a real model? All on one scale.

    python analyses/mechanism_table.py            about 15 minutes of CPU
    python analyses/mechanism_table.py --resume   goes on where it was stopped; a stopped run keeps what it has
    python analyses/mechanism_table.py --only gqa some rows, beside those that are there; a run of its own, as above

Layer 12 of SmolLM2-135M-Instruct (dequantised from 4 bits), held-out Wikipedia in windows of 512, calibration on
speeches, before any training; 40 % of the predictions are compared, as in a scan. One pass of the original serves all
students (`mismatch.stages.scan`). Per mechanism: KL, difference of the text's own NLL, and the share of the damage of
`zero` in the same slot (KL over KL; both resampled by the same documents). Beside layer 12 the compressive memory is
put into all layers at once, with what bounds it there.
Writes figures/mechanism_table/mechanism_table.{csv,json,png}; what the mechanisms cost is
`python analyses/mechanism_costs.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tqdm import tqdm

import mismatch
from mismatch import spec
from mismatch.metrics.base import TokenSums
from mismatch.report.style import (
    FAINT,
    INK,
    ZERO,
    frame,
    new_figure,
    styled,
    to_bytes,
)  # fmt: skip
from mismatch.runs.files import json_text
from mismatch.runs.state import State
from mismatch.stages.scan.batches import measure, prove_restored
from mismatch.stages.scan.cells import Cell, cells, columns, joint
from mismatch.stages.scan.config import ScanConfig
from mismatch.stages.scan.stage import sweep_of
from mismatch.stages.scan.sums import Sums
from mismatch.stages.scan.tasks import Task, text_task
from mismatch.texts.documents import calibration_and_evaluation

LAYER = 12
ROUNDING = 1e-7
"""Nats: less is none."""
BATCH = 4
"""Windows that run together."""
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "exact": ("#56b4e9", ("identity", "ring")),
    "control": (
        "#777777",
        ("zero", "mean", "linear", "random", "mlp:zero", "mlp:mean", "mlp:linear", "skip",
         "block:linear", "norm1:zero", "norm2:zero"),
    ),
    "compressive memory": (
        "#d55e00",
        ("infini(segment=64)", "infini", "infini(segment=64, sinks=1)",
         "parallel(infini(segment=64), alpha=0.1)"),
    ),
    "recurrent": ("#7a5195", ("mamba2", "gated_deltanet", "mamba", "rwkv", "short_conv", "kda")),
    "linear attention": (
        "#a6761d",
        ("linear_attention", "linear_attention(window=64)",
         "linear_attention(window=64, sinks=1)"),
    ),
    "window": (
        "#0072b2",
        ("sliding_window(window=64)", "sliding_window(window=64, sinks=1)",
         "sliding_window(window=64, sinks=1, global_every=16)"),
    ),
    "position": (
        "#009e73",
        ("nope", "partial_rope(fraction=0.5)", "yarn(factor=4)", "rope(type=linear, factor=4)",
         "rope(type=dynamic, factor=4)", "rope(type=longrope, factor=4)", "rope(type=llama3, factor=4)",
         "rope(type=proportional, fraction=0.25)"),
    ),
    "adapter": (
        "#cc79a7",
        ("lora", "qlora", "houlsby", "parallel_adapter", "adapterplus", "gated_attention"),
    ),
    "smaller cache": ("#332288", ("mla(rank=128)", "gqa(groups=1)")),
    "sparse": ("#117733", ("topk", "moba(block=16, top=4)")),
    "few bits": ("#ddcc77", ("quantized",)),
    "low rank": ("#882255", ("low_rank_mlp(rank=64)", "low_rank_mlp(rank=256)")),
    "norm": ("#e69f00", ("norm1:dyt", "norm2:dyt")),
}  # fmt: skip
WHOLE = {
    "all:infini(segment=64)": "compressive memory",
    "all:infini(segment=64, sinks=1)": "compressive memory",
    "all:zero": "control",
}
HERE = Path(__file__).resolve().parent.parent / "figures" / "mechanism_table"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="what to operate on")
    parser.add_argument("--tokens", type=int, default=4096, help="of the held-out text")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window")
    parser.add_argument("--calibration-tokens", type=int, default=4096, help="of the speeches")
    parser.add_argument("--layer", type=int, default=LAYER, help="which one is operated on")
    parser.add_argument(
        "--state", type=Path, default=Path("runs/mechanism_table"), help="to go on from"
    )
    parser.add_argument("--only", nargs="+", metavar="SWAP", help="these rows; the others stay")
    parser.add_argument("--resume", action="store_true", help="go on from the saved state")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    parser.add_argument(
        "--draw", action="store_true", help="only the picture, from the csv that is there"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    places = {kind: args.output / f"mechanism_table.{kind}" for kind in ("csv", "json", "png")}
    if not args.draw:
        if not args.resume:
            shutil.rmtree(args.state, ignore_errors=True)
        torch.set_num_threads(1)
        table, made = measured(args)
        if args.only:
            kept = pd.read_csv(places["csv"])
            table = ordered(pd.concat([kept[~kept.swap.isin(table.swap)], table]))
        table.to_csv(places["csv"], index=False, lineterminator="\n", float_format="%.6g")
        places["json"].write_text(json_text(made))
    table, made = pd.read_csv(places["csv"]), json.loads(places["json"].read_text())
    caption = (
        f"{made['model']}, layer {made['layer']}, {made['tokens']} tokens of {made['text']} in windows of "
        f"{made['seq_len']}, {made['scored']} predictions of {made['documents']} documents, 95 % intervals over "
        "documents (few: too narrow). Hollow: 0 up to rounding. Below the line: all layers at once. mlp:, norm1: name "
        "the slot where it is not the mechanism's own; skip stands for zero where a whole block is replaced."
    )
    places["png"].write_bytes(to_bytes(draw(table, caption), "png"))
    print(table.to_string(index=False))


def measured(args: argparse.Namespace) -> tuple[pd.DataFrame, dict]:
    """Every student on every window, one row each, ordered by damage; and how it was done."""
    teacher = mismatch.load(args.model)
    layout = teacher.layout
    swaps = tuple(args.only or (text for _, texts in KINDS.values() for text in texts))
    config = ScanConfig(
        model=args.model, swap=swaps, among=str(args.layer), seq_len=args.seq_len, tokens=args.tokens,
        calibration_tokens=args.calibration_tokens,
    )  # fmt: skip
    made = columns(config.templates, ("zero",))
    whole = [joint(text, spec.check(spec.parse(text)), layout) for text in WHOLE if not args.only]
    every = tuple(sorted([*cells(made, [args.layer], layout), *whole], key=lambda cell: cell.first))
    set_from, held_out = calibration_and_evaluation(config.calibration_data, config.data)
    cut = mismatch.windows(held_out, teacher.tokenizer, args.seq_len, args.tokens, config.seed)
    length, tokens = min(args.seq_len, args.calibration_tokens), args.calibration_tokens
    calibration = mismatch.windows(set_from, teacher.tokenizer, length, tokens, config.seed)
    sweep = sweep_of(teacher, config, every, calibration)
    task = text_task(cut, config.scored, config.seed)
    with tqdm(total=len(every) * math.ceil(len(cut) / BATCH), unit="run") as bar:
        sums = measure(
            sweep, every, [task], batch_tokens=BATCH * args.seq_len, state=State(args.state), progress=bar.update,
            fingerprint={
                "cells": [cell.key for cell in every], "text": cut.fingerprint, "settings": config.fingerprint()
            },
        )  # fmt: skip
    prove_restored(sweep)
    about = {
        "model": teacher.info.name, "layer": args.layer, "text": held_out.source, "calibration": set_from.source,
        "tokens": cut.tokens, "scored": sums.part(every[0], task, "kl").n, "seq_len": args.seq_len,
        "documents": cut.n_docs, "calibration_tokens": args.calibration_tokens, "seed": config.seed,
        "versions": mismatch.versions(),
    }  # fmt: skip
    bounds = {column.name: column.controls for column in made}
    return rows(sums, every, task, bounds), about


def rows(
    sums: Sums, every: Sequence[Cell], task: Task, bounds: dict[str, tuple[str, ...]]
) -> pd.DataFrame:
    """KL, NLL difference and share of each student."""
    at = {cell.name: cell for cell in every}
    kind = {
        str(t): name for name, (_, texts) in KINDS.items() for t in spec.templates(texts)
    } | WHOLE
    found = []
    for cell in every:
        bound = "all:zero" if cell.layer is None else next(iter(bounds[cell.name]), cell.name)
        kl, nll = (sums.part(cell, task, metric) for metric in ("kl", "nll"))
        zero = sums.part(at[bound], task, "kl")
        row: dict[str, Any] = {
            "swap": cell.name,
            "kind": kind[cell.name],
            "layers": "all" if cell.layer is None else cell.layer,
        }
        for name, reading in (
            ("kl", kl.mean("kl")), ("nll", nll.mean("shift")), ("share", share(kl, zero)),
        ):  # fmt: skip
            value, lo, hi = (
                reading if isinstance(reading, tuple) else (reading.value, reading.lo, reading.hi)
            )
            row |= {name: value, f"{name}_lo": lo, f"{name}_hi": hi}
        found.append(row | {"of": bound, "n": kl.n})
    return ordered(pd.DataFrame(found))


def ordered(table: pd.DataFrame) -> pd.DataFrame:
    """The smallest damage first, all layers at once last."""
    return table.sort_values(
        ["layers", "kl", "swap"], key=lambda c: c == "all" if c.name == "layers" else c
    )


def share(part: TokenSums, zero: TokenSums) -> tuple[float, float, float]:
    """KL over the KL of deleting the module, with an interval: both from the same resampled documents."""
    return part.per_document("kl").over(zero.per_document("kl"))[:3]


@styled
def draw(table: pd.DataFrame, caption: str) -> Figure:
    """Three panels over one list of mechanisms: KL, share of zero's damage, NLL difference."""
    table = table.iloc[::-1].reset_index(drop=True)
    border = int((table.layers.astype(str) == "all").sum()) - 0.5
    figure = new_figure(7.0, 1.4 + 0.14 * len(table))
    axes = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1, 1.1))
    titles = (
        "KL\nnats per token",
        "KL / KL of zero\nin the same slot",
        "NLL difference\nnats per token",
    )
    for ax, column, title in zip(axes, ("kl", "share", "nll"), titles, strict=True):
        _panel(ax, table, column)
        ax.set_xlabel(title)
        ax.axhline(border, color=INK, linewidth=0.8)
        ax.margins(y=0.008)
        ax.grid(axis="y", color="#eeeeee", linewidth=0.5)
        ax.set_axisbelow(True)
        ax.tick_params(axis="x", labelsize=6)
        ax.tick_params(axis="y", length=0, labelsize=6.5)
    axes[0].set_yticks(range(len(table)), table.swap)
    axes[1].axvline(1, color=FAINT, linewidth=0.8, linestyle="--")
    axes[2].axvline(0, color=FAINT, linewidth=0.8)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=c, markersize=4) for c, _ in KINDS.values()
    ]
    # Where nothing is lost, nothing is drawn to the right of 0.
    axes[2].legend(
        handles, list(KINDS), loc="upper right", frameon=False, fontsize=6, handletextpad=0.1
    )
    frame(figure, "What each mechanism does to the model before any training", caption)
    return figure


def _panel(ax: Axes, table: pd.DataFrame, column: str) -> None:
    """Points with their intervals; on log axes what is 0 up to rounding stands at the left edge, hollow."""
    value, lo, hi = (
        table[name].to_numpy(float) for name in (column, f"{column}_lo", f"{column}_hi")
    )
    edge = None
    if column == "nll":
        ax.set_xscale("symlog", linthresh=0.01, linscale=0.7)
        ax.set_xticks([-0.01, 0, 0.01, 0.1, 1, 10], ["-0.01", "0", "", "0.1", "1", "10"])
    else:
        ax.set_xscale("log")
        floor = 10.0 ** round(math.log10(value[value > ROUNDING].min()) - 0.5)
        top = 10.0 ** math.ceil(math.log10(np.nanmax(hi)))
        edge = floor / 12
        ticks = [t for t in 10.0 ** np.arange(-6, 4) if floor <= t <= top]
        ax.set_xticks(
            [edge, *ticks], ["0", *(f"{t:g}" if math.log10(t) % 2 == 0 else "" for t in ticks)]
        )
        ax.set_xlim(edge / 1.8, top * 1.3)
        ax.axvline(floor / 2, color=FAINT, linewidth=0.5, linestyle=":")
    ax.minorticks_off()
    for y, (x, low, high, kind) in enumerate(zip(value, lo, hi, table.kind, strict=True)):
        colour = KINDS[kind][0]
        if edge is not None and x <= ROUNDING:
            ax.plot(edge, y, "o", markersize=3.5, markerfacecolor=ZERO, markeredgecolor=colour)
            continue
        ax.plot([low, high], [y, y], color=colour, linewidth=1)
        ax.plot(x, y, "o", markersize=3.5, color=colour)


if __name__ == "__main__":
    main()
