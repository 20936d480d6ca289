"""What does a trace cost, against the model work it cannot avoid and against the way people do it today?

    python analyses/benchmark_trace.py time       about 40 minutes; wants a quiet machine
    python analyses/benchmark_trace.py shares     about 6 minutes: what a trace does beside its models
    python analyses/benchmark_trace.py memory     about 10 minutes on two cores

Time is CPU time of one process with one thread, all ways interleaved in one run after a short warm-up.

| way | what it does |
|---|---|
| `bound` | the work a trace cannot avoid: a teacher forward, a suffix per student, heads included; measures nothing |
| `mismatch` | the whole trace of swap, zero and mean: every metric, intervals, floor, table |
| `plain` | four whole forwards (teacher, swap, zero, mean), logits kept, nothing measured |
| `nnsight + pytorch-cka` | two nnsight traces (teacher, swap) that store sites and logits, then CKA, KL; one student |

The last way runs over the first 4096 tokens, for more do not fit into memory, and is scaled. It needs a package that
`make` does not install: `.venv/bin/python -m pip install -c constraints.txt pytorch_cka`.

`shares` divides the CPU time of one trace of 8192 tokens by what it is spent on, each second counted once:

| share | what |
|---|---|
| `models` | blocks and heads of teacher, swap, `zero` and `mean`: the work that cannot be avoided |
| `metrics` | sums over tokens, documents and channels; log-softmax and divergences |
| `calibration` | the pass that sets the control `mean` |
| `floor` | the first window once more in another shape |
| `table` | intervals, rows, findings, summary |
| `rest` | reading and cutting the texts, planning, proofs |

Memory is the peak of a process of its own: `mismatch trace` over 8k and over 64k tokens.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure

import mismatch
from mismatch.forward import paired_sites
from mismatch.models.layout import Layout
from mismatch.runs.table import FLOOR
from mismatch.stages import runner
from mismatch.stages.trace import batches as loop
from mismatch.stages.trace import stage
from mismatch.stages.trace.batch import Batch
from mismatch.surgery import students as making
from mismatch.surgery.controls import control_specs
from mismatch.surgery.students import calibrated_swap

SWAP = "layer12:infini(segment=64)"
BLUE = "#4c78a8"
STORED = 4096  # tokens whose activations fit into memory, for the way that stores them
SHARES = ("models", "metrics", "calibration", "floor", "table", "rest")
WHOLE = ("calibration", "floor")  # what runs inside them is theirs
HERE = Path(__file__).resolve().parent.parent / "figures" / "benchmark_trace"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer tokens: a look, not a claim")
    parser.add_argument("part", choices=("time", "shares", "memory"))
    parser.add_argument("--tokens", type=int, help="of the timing: 16384, or 8192 for shares")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of timing")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    if args.part == "time" and importlib.util.find_spec("cka") is None:
        parser.error(
            "`time` compares with pytorch-cka, which is not installed\n\n"
            f"hint: {sys.executable} -m pip install -c constraints.txt pytorch_cka"
        )
    if args.part != "memory":
        torch.set_num_threads(1)
    usual = {"time": 16384, "shares": 8192}.get(args.part, 0)
    tokens, seq_len = (1024, 512) if args.quick else (args.tokens or usual, 1024)
    rounds = 1 if args.quick else args.rounds
    if args.part == "shares":
        settings = {"tokens": tokens, "seq_len": seq_len}
        report_shares(args.output, shares(tokens, seq_len), settings)
    elif args.part == "time":
        settings = {"tokens": tokens, "seq_len": seq_len, "rounds": rounds}
        report_times(args.output, times(tokens, seq_len, rounds), settings)
    else:
        lengths = (1024, 4096) if args.quick else (8192, 65536)
        report_memory(args.output, {n: peak(n) for n in lengths})


def times(tokens: int, seq_len: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each way, one number a round."""
    teacher = mismatch.load("smollm2")
    text = mismatch.read_documents("wiki")
    cut = mismatch.windows(text, teacher.tokenizer, seq_len, tokens, 0)
    set_from = mismatch.windows(
        mismatch.read_documents("sotu"), teacher.tokenizer, seq_len, 2048, 0
    )
    swap = mismatch.swap(teacher, SWAP)
    controls = control_specs(("zero", "mean"), swap.plan)
    students = [
        swap,
        *(calibrated_swap(teacher, s, set_from, name=n) for n, s in controls.items()),
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
        "nnsight + pytorch-cka": lambda: stored(teacher, swap, batches[: STORED // (4 * seq_len)]),
    }
    part = tokens / min(tokens, STORED)
    found: dict[str, list[float]] = {name: [] for name in ways}
    # Imports and allocations of the first use belong to nobody.
    mismatch.trace(teacher, swap, data="wiki", tokens=256, seq_len=256, calibration_tokens=256)
    stored(teacher, swap, [batches[0][:1, :64]])
    for index in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            spent = time.process_time() - start
            found[name].append(spent * (part if name.startswith("nnsight") else 1))
            print(f"round {index + 1} {name}: {found[name][-1]:.1f} CPU-s", file=sys.stderr)
    return found


class Stopwatch:
    """CPU seconds by share. A second belongs to the innermost share that runs, or to an outer one of `WHOLE`."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._running: list[str] = []
        self._since = time.process_time()

    @contextmanager
    def on(self, share: str) -> Iterator[None]:
        if self._running and self._running[-1] in WHOLE:
            share = self._running[-1]
        self._book()
        self._running.append(share)
        try:
            yield
        finally:
            self._book()
            self._running.pop()

    def _book(self) -> None:
        now = time.process_time()
        if self._running:
            name = self._running[-1]
            self.spent[name] = self.spent.get(name, 0.0) + now - self._since
        self._since = now


def timed(watch: Stopwatch, owner: Any, name: str, share: Callable[..., str]) -> Any:
    """A patch of a function that books its time; `share` names it by the arguments."""
    real = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with watch.on(share(*args, **kwargs)):
            return real(*args, **kwargs)

    return mock.patch.object(owner, name, call)


def shares(tokens: int, seq_len: int) -> dict[str, float]:
    """CPU seconds of one trace by share."""
    teacher = mismatch.load("smollm2")
    swap = mismatch.swap(teacher, SWAP)
    mismatch.trace(teacher, swap, data="wiki", tokens=256, seq_len=256, calibration_tokens=256)
    watch = Stopwatch()
    patches: list[tuple[Any, str, Callable[..., str]]] = [
        (making, "calibrate", lambda *_, **__: "calibration"),
        (loop, "stream", lambda *_, **__: "models"),
        (
            paired_sites._Pairing,
            "free",
            lambda pairing, *_: "floor" if pairing.runner.name == FLOOR else "models",
        ),
        (Batch, "met", lambda _, pair: "floor" if pair.student == FLOOR else "metrics"),
        (Batch, "finish", lambda *_: "metrics"),
        (Batch, "_logits", lambda _, scope, __: "floor" if scope == FLOOR else "metrics"),
        (Layout, "head", lambda *_: "models"),
        (stage.Collector, "rows", lambda *_: "table"),
        (runner.tables, "as_table", lambda *_: "table"),
        (stage, "findings_of", lambda *_: "table"),
    ]
    with ExitStack() as stack:
        for owner, name, share in patches:
            stack.enter_context(timed(watch, owner, name, share))
        with watch.on("rest"):
            mismatch.trace(teacher, swap, data="wiki", tokens=tokens, seq_len=seq_len)
    return watch.spent


def report_shares(folder: Path, seconds: dict[str, float], settings: dict) -> None:
    """Each share beside the models' own."""
    rows: list[dict[str, Any]] = [
        {
            "share": name,
            "cpu_seconds": seconds[name],
            "of_models": seconds[name] / seconds["models"],
        }
        for name in SHARES
    ]
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    ax = figure.subplots()
    beside = rows[1:]
    ax.barh([r["share"] for r in beside], [100 * r["of_models"] for r in beside], color=BLUE)
    for index, row in enumerate(beside):
        ax.text(100 * row["of_models"], index, f" {100 * row['of_models']:.1f} %", va="center")
    total = sum(row["of_models"] for row in rows)
    ax.set(
        xlabel="CPU time, % of the models' own",
        title=f"A trace is {total:.2f} times its models: {settings['tokens']} tokens, SmolLM2,\n{SWAP}",
    )
    ax.invert_yaxis()
    ax.margins(x=0.15)
    keep(figure, folder, "shares", rows, {"settings": settings})


@torch.no_grad()
def bound(teacher: Layout, students: list[Layout], first: int, ids: torch.Tensor) -> None:
    """One teacher forward, one suffix a student, and the head on all of them, in chunks."""
    kept: dict[str, torch.Tensor] = {}
    entering = mismatch.taps(teacher, first - 1)[-1:]
    finals = [
        mismatch.run_tapped(teacher, ids, entering, lambda tap, value: kept.__setitem__("h", value))
    ]
    finals += [
        mismatch.run_tapped(s, ids, (), lambda *_: None, start=first, stream=kept["h"])
        for s in students
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


def report_times(folder: Path, seconds: dict[str, list[float]], settings: dict) -> None:
    """Ratio to the work that cannot be avoided, of each way."""
    base = np.array(seconds["bound"])
    rows: list[dict[str, Any]] = [
        {
            "way": name,
            "cpu_seconds": float(np.median(values)),
            "ratio_to_bound": float(np.median(np.array(values) / base)),
        }
        for name, values in seconds.items()
    ]
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    ax = figure.subplots()
    ax.barh([row["way"] for row in rows], [row["ratio_to_bound"] for row in rows], color=BLUE)
    ax.axvline(1, color="black", linewidth=0.8)
    for index, row in enumerate(rows):
        ax.text(row["ratio_to_bound"], index, f" {row['ratio_to_bound']:.2f}", va="center")
    ax.set(
        xlabel="CPU time / work that cannot be avoided",
        title=f"{settings['tokens']} tokens, SmolLM2, {SWAP}",
    )
    ax.invert_yaxis()
    ax.margins(x=0.12)
    keep(figure, folder, "time", rows, {"settings": settings, "seconds": seconds})


def report_memory(folder: Path, peaks: dict[int, int]) -> None:
    """Peak memory by length of the text."""
    rows = [{"tokens": n, "peak_megabytes": size / 1e6} for n, size in peaks.items()]
    figure = Figure(figsize=(3.4, 2.6), layout="constrained")
    ax = figure.subplots()
    bars = ax.bar([f"{n // 1024}k" for n in peaks], [r["peak_megabytes"] for r in rows], color=BLUE)
    ax.bar_label(bars, fmt="%.0f")
    ax.margins(y=0.15)
    ax.set(xlabel="tokens", ylabel="peak memory, MB", title=f"SmolLM2\n{SWAP}")
    keep(figure, folder, "memory", rows, {})


def keep(figure: Figure, folder: Path, name: str, rows: list[dict], facts: dict) -> None:
    """Picture, its data, how it was made; the table on stdout."""
    folder.mkdir(parents=True, exist_ok=True)
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / f"{name}.png", dpi=200)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    made = {**facts, "versions": mismatch.versions()}
    (folder / f"{name}.json").write_text(json.dumps(made, indent=2) + "\n")
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
