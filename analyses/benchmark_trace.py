"""What does a trace cost, against the model work it cannot avoid and against the way people do it today?

    python analyses/benchmark_trace.py            time, memory and the picture, about 25 minutes on two cores
    python analyses/benchmark_trace.py --quick    fewer tokens, no 64k run: a look, not a claim

Time is CPU time of one process with one thread, all ways interleaved in one run after a short warm-up.

| way | what it does |
|---|---|
| `bound` | the work a trace cannot avoid: a teacher forward, a suffix per student, heads included; measures nothing |
| `mismatch` | the whole trace of swap, zero and mean: every metric, intervals, floor, table |
| `plain` | four whole forwards (teacher, swap, zero, mean), logits kept, nothing measured |
| `nnsight + pytorch-cka` | two nnsight traces (teacher, swap) that store sites and logits, then CKA, KL; one student |

Memory is the peak of a process of its own: `mismatch trace` over 8k and over 64k tokens.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mismatch
from mismatch import data, environment
from mismatch.controls import control_specs
from mismatch.layout import Layout
from mismatch.operating import calibrated_swap
from mismatch.tracing import hooks
from mismatch.tracing.sites import taps
from mismatch.windows import windows

SWAP = "layer12:infini(segment=64)"
HERE = Path(__file__).resolve().parent.parent / "figures" / "benchmark_trace"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer tokens, no 64k run")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of timing")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens, seq_len, rounds = (1024, 512, 1) if args.quick else (8192, 1024, args.rounds)
    settings = {"tokens": tokens, "seq_len": seq_len, "rounds": rounds}
    seconds = times(tokens, seq_len, rounds)
    report(args.output, seconds, {}, settings)  # so that a run cut short leaves what it has
    peaks = {n: peak(n) for n in ((1024, 4096) if args.quick else (8192, 65536))}
    report(args.output, seconds, peaks, settings)


def times(tokens: int, seq_len: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each way, one number a round."""
    teacher = mismatch.load("smollm2")
    text = data.read("wiki")
    cut = windows(text, teacher.tokenizer, seq_len, tokens, 0)
    options = {
        "calibration": "sotu",
        "tokens": 2048,
        "seq_len": seq_len,
        "batch_size": 4,
        "seed": 0,
    }
    swap = mismatch.swap(teacher, SWAP)
    controls = control_specs(("zero", "mean"), swap.plan)
    students = [
        swap,
        *(calibrated_swap(teacher, s, name=n, **options) for n, s in controls.items()),
    ]
    batches = [torch.from_numpy(batch.ids) for batch in cut.batches(4)]
    ways: dict[str, Callable[[], object]] = {
        "bound": lambda: [
            bound(teacher.layout, [s.layout for s in students], 12, ids) for ids in batches
        ],
        "mismatch": lambda: mismatch.trace(
            teacher, swap, data="wiki", tokens=tokens, seq_len=seq_len
        ),
        "plain": lambda: [
            plain([teacher.model, *(s.model for s in students)], ids) for ids in batches
        ],
        "nnsight + pytorch-cka": lambda: stored(teacher, swap, batches),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    # Imports and allocations of the first use belong to nobody.
    mismatch.trace(teacher, swap, data="wiki", tokens=256, seq_len=256, calibration_tokens=256)
    stored(teacher, swap, [batches[0][:1, :64]])
    for index in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            found[name].append(time.process_time() - start)
            print(f"round {index + 1} {name}: {found[name][-1]:.1f} CPU-s", file=sys.stderr)
    return found


@torch.no_grad()
def bound(teacher: Layout, students: list[Layout], first: int, ids: torch.Tensor) -> None:
    """One teacher forward, one suffix a student, and the head on all of them, in chunks."""
    kept = {}
    entering = taps(teacher, first - 1)[-1:]
    finals = [hooks.run(teacher, ids, entering, lambda tap, value: kept.__setitem__("h", value))]
    finals += [
        hooks.run(s, ids, (), lambda *_: None, start=first, stream=kept["h"]) for s in students
    ]
    for final in finals:
        for chunk in final.flatten(0, 1).split(256):
            teacher.head(chunk)


@torch.no_grad()
def plain(models: list[torch.nn.Module], ids: torch.Tensor) -> None:
    for model in models:
        model(input_ids=ids, use_cache=False)


@torch.no_grad()
def stored(teacher: Any, swap: Any, batches: list[torch.Tensor]) -> dict[str, float]:
    """Today's way: keep every site of both models for the whole text, then compare."""
    import cka
    from nnsight import NNsight

    kept: list[dict[str, list[torch.Tensor]]] = []
    for model in (teacher.model, swap.model):
        wrapped = NNsight(model)
        store: dict[str, list[torch.Tensor]] = {}
        for ids in batches:
            with wrapped.trace(input_ids=ids, use_cache=False):
                for i, layer in enumerate(wrapped.model.layers):
                    store.setdefault(f"{i}.attn_out", []).append(layer.self_attn.output[0].cpu())
                    store.setdefault(f"{i}.mlp_out", []).append(layer.mlp.output.cpu())
                    store.setdefault(f"{i}.resid_post", []).append(layer.output.cpu())
                store.setdefault("logits", []).append(wrapped.output.logits.cpu())
        kept.append(store)
    values = {}
    for name in kept[0]:
        x, y = (torch.cat(store[name]).flatten(0, 1) for store in kept)
        if name == "logits":
            p, q = x.log_softmax(-1), y.log_softmax(-1)
            values["kl"] = float((p.exp() * (p - q)).sum(-1).mean())
        else:
            rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:2048]
            values[name] = float(cka.cka_from_features(x[rows], y[rows]))
    return values


def peak(tokens: int) -> int:
    """Peak memory, in bytes, of a whole `mismatch trace` over so many tokens."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "mismatch", "trace", "--model", "smollm2", "--swap", SWAP]
        command += ["--tokens", str(tokens), "--seq-len", "512", "--calibration-tokens", "1024"]
        subprocess.run(
            [*command, "--controls", "none", "--quiet", "--output", str(run)], check=True
        )
        size = json.loads((run / "manifest.json").read_text())["peak_memory_bytes"]
    print(f"{tokens} tokens: {size / 1e6:.0f} MB", file=sys.stderr)
    return size


def report(
    folder: Path, seconds: dict[str, list[float]], peaks: dict[int, int], settings: dict
) -> None:
    """Table on stdout; csv, json and the picture in `folder`."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    base = np.array(seconds["bound"])
    rows = [
        {
            "way": name,
            "cpu_seconds_median": float(np.median(values)),
            "cpu_seconds_min": float(np.min(values)),
            "ratio_to_bound": float(np.median(np.array(values) / base)),
        }
        for name, values in seconds.items()
    ]
    rows += [
        {"way": f"peak memory, {n} tokens", "megabytes": size / 1e6} for n, size in peaks.items()
    ]
    names = ["way", "cpu_seconds_median", "cpu_seconds_min", "ratio_to_bound", "megabytes"]
    with open(folder / "benchmark_trace.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    made = {
        "settings": settings,
        "seconds": seconds,
        "peaks": peaks,
        "versions": environment.versions(),
    }
    (folder / "benchmark_trace.json").write_text(json.dumps(made, indent=2) + "\n")
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    ways = rows[: len(seconds)]
    left.barh([r["way"] for r in ways], [r["ratio_to_bound"] for r in ways], color="#4c78a8")
    left.axvline(1, color="black", linewidth=0.8)
    left.axvline(1.25, color="black", linewidth=0.8, linestyle=":")
    for index, row in enumerate(ways):
        left.text(row["ratio_to_bound"], index, f" {row['ratio_to_bound']:.2f}", va="center")
    left.set(
        xlabel="CPU time / work that cannot be avoided",
        title=f"{settings['tokens']} tokens, SmolLM2, {SWAP}",
    )
    left.invert_yaxis()
    left.margins(x=0.12)
    left.spines[["top", "right"]].set_visible(False)
    right.bar(
        [f"{n // 1024}k" for n in peaks], [size / 1e9 for size in peaks.values()], color="#4c78a8"
    )
    right.set(xlabel="tokens", ylabel="peak memory, GB", title="one student")
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "benchmark_trace.png", dpi=200)
    for row in rows:
        print(
            "  ".join(
                f"{key}={value:.4g}" if isinstance(value, float) else str(value)
                for key, value in row.items()
            )
        )


if __name__ == "__main__":
    main()
