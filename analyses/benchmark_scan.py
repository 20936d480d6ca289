"""What does a scan of all layers with one mechanism cost, in forwards of the whole model?

    python analyses/benchmark_scan.py            about 10 minutes of CPU; wants a quiet machine
    python analyses/benchmark_scan.py --quick    fewer tokens: a look, not a claim

The unit is the CPU time of one whole forward of the original over the same windows, `model(ids)` with all logits, one
process and one thread. A forward is short and the machine is not alone, so it is timed three times before each way, and
the median of a round's is that round's unit.

| way | what it does |
|---|---|
| `forward` | the original once, logits of every token included: the unit |
| `blocks` | what a scan cannot avoid: the original's blocks once, and each layer's suffix; no head, nothing measured |
| `scan` | the whole `mismatch.scan` as it is by default: blocks, head and KL on 30 % of the predictions, table |
| `scan, all scored` | the same with the head and KL on every prediction, as a trace does |
| `naive` | for each layer a whole forward of the original and of the student, and KL; 3 layers measured, 30 counted |

The head is counted wherever it runs. In blocks alone a scan is 1 + (30 + 29 + .. + 1) / 30 = 16.5 forwards.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import mismatch
from mismatch import spec
from mismatch.stages.scan.cells import cells, columns
from mismatch.surgery.operate import blank, holding

SWAP = "sliding_window(64, 1)"
LIMIT = 17
"""Forwards that a scan of all 30 layers may cost."""
NAIVE = (2, 14, 27)
"""Layers that the naive way is measured on."""
BLUE = "#4c78a8"
WORDS = {
    "forward": "one forward with logits: the unit",
    "blocks": "blocks alone: cannot be avoided",
    "scan": "mismatch scan (30 % of tokens scored)",
    "scan, all scored": "mismatch scan (all tokens scored)",
    "naive": "both models whole, layer by layer",
}
HERE = Path(__file__).resolve().parent.parent / "figures" / "benchmark_scan"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer tokens: a look, not a claim")
    parser.add_argument("--model", default="smollm2", help="what to scan")
    parser.add_argument("--tokens", type=int, default=1024, help="of the text")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of timing")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens, seq_len, rounds = (256, 128, 1) if args.quick else (args.tokens, 512, args.rounds)
    seconds, layers = times(args.model, tokens, seq_len, rounds)
    settings = {"model": args.model, "swap": SWAP, "tokens": tokens, "seq_len": seq_len}
    report(args.output, seconds, layers, settings)


def times(name: str, tokens: int, seq_len: int, rounds: int) -> tuple[dict[str, list[float]], int]:
    """CPU seconds of each way, one number a round; and the number of layers."""
    teacher = mismatch.load(name)
    layers = teacher.layout.n_layers
    cut = mismatch.windows(mismatch.read_documents("wiki"), teacher.tokenizer, seq_len, tokens, 0)
    ids = torch.from_numpy(cut.ids)
    naive = [layer for layer in NAIVE if layer < layers] or [0]
    students = {layer: mismatch.swap(teacher, spec.format(template().at(layer))) for layer in naive}
    given: dict[str, Any] = {
        "data": "wiki",
        "tokens": tokens,
        "seq_len": seq_len,
        "batch_size": len(ids),
    }
    given |= {"controls": (), "tasks": ("text",)}
    ways: dict[str, Callable[[], object]] = {
        "blocks": lambda: blocks(teacher, ids),
        "scan": lambda: mismatch.scan(teacher, SWAP, **given),
        "scan, all scored": lambda: mismatch.scan(teacher, SWAP, scored=1.0, **given),
        "naive": lambda: [pair(teacher, student.model, ids) for student in students.values()],
    }
    part = layers / len(naive)
    found: dict[str, list[float]] = {way: [] for way in ("forward", *ways)}
    # Imports and allocations of the first use belong to nobody.
    mismatch.scan(teacher, SWAP, among="last", **{**given, "tokens": seq_len})
    forward(teacher.model, ids)
    for index in range(rounds):
        units = []
        for way, run in ways.items():
            units += [spent(lambda: forward(teacher.model, ids)) for _ in range(3)]
            found[way].append(spent(run) * (part if way == "naive" else 1))
        found["forward"].append(float(np.median(units)))
        said = ", ".join(f"{way} {values[-1]:.2f}" for way, values in found.items())
        print(
            f"round {index + 1}, CPU-s: {said}; units {min(units):.2f}-{max(units):.2f}",
            file=sys.stderr,
        )
    return found, layers


def spent(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def template() -> spec.Template:
    return spec.templates(SWAP)[0]


@torch.no_grad()
def forward(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model(input_ids=ids, use_cache=False)


@torch.no_grad()
def blocks(teacher: mismatch.Teacher, ids: torch.Tensor) -> None:
    """The original's blocks once, then from each block on with that one swapped."""
    layout, kept = teacher.layout, dict[int, torch.Tensor]()
    wanted = [mismatch.taps(layout, layer)[-1] for layer in range(layout.n_layers - 1)]
    mismatch.run_tapped(
        layout, ids, wanted, lambda tap, value: kept.__setitem__(tap.layer + 1, value)
    )
    base = blank(layout)
    every = cells(columns((template(),), ()), range(layout.n_layers), layout)
    for cell in every:
        with holding(base, cell.placements):
            stream = kept.get(cell.first)
            mismatch.run_tapped(
                base.layout, ids, (), lambda *_: None, start=cell.first, stream=stream
            )


@torch.no_grad()
def pair(teacher: mismatch.Teacher, student: torch.nn.Module, ids: torch.Tensor) -> float:
    """As one writes it by hand: both models whole, KL of all tokens in small pieces."""
    total = 0.0
    ours, theirs = (
        model(input_ids=ids, use_cache=False).logits for model in (teacher.model, student)
    )
    for p, q in zip(ours.flatten(0, 1).split(64), theirs.flatten(0, 1).split(64), strict=True):
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / ids.numel()


def report(folder: Path, seconds: dict[str, list[float]], layers: int, settings: dict) -> None:
    """Each way in forwards."""
    unit = np.array(seconds["forward"])
    rows: list[dict[str, Any]] = [
        {
            "way": way,
            "cpu_seconds": float(np.median(values)),
            "forwards": float(np.median(np.array(values) / unit)),
        }
        for way, values in seconds.items()
    ]
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    ax = figure.subplots()
    ax.barh([WORDS[row["way"]] for row in rows], [row["forwards"] for row in rows], color=BLUE)
    ax.axvline(LIMIT, color="black", linewidth=0.8)
    for index, row in enumerate(rows):
        inside = row["forwards"] > 0.1 * max(row["forwards"] for row in rows)
        ax.text(
            row["forwards"], index, f" {row['forwards']:.1f} ", va="center", fontsize=8,
            ha="right" if inside else "left", color="white" if inside else "black",
        )  # fmt: skip
    ax.tick_params(labelsize=8)
    ax.set_xlabel(f"CPU time / CPU time of one forward (line: {LIMIT})", fontsize=8)
    ax.set_title(
        f"{SWAP} in each of {layers} layers of {settings['model']}, {settings['tokens']} tokens",
        fontsize=9,
        loc="right",
    )
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.spines[["top", "right"]].set_visible(False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "cost.png", dpi=200)
    with open(folder / "cost.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    made = {"settings": settings, "seconds": seconds, "versions": mismatch.versions()}
    (folder / "cost.json").write_text(json.dumps(made, indent=2) + "\n")
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
