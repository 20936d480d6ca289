"""What does a step of local distillation cost, and what does the whole repair cost against the field's way?

    python analyses/benchmark_repair.py            about 13 minutes of CPU
    python analyses/benchmark_repair.py --quick    fewer tokens: a look, not a claim

CPU time of one process and one thread, ways interleaved, median of the rounds. Per token that is trained on:

    layer   forward and backward of the swapped layer alone, all of its parameters, on inputs in memory: the unit
    step    a whole step of the stage `local`: read from disk, layer, loss, backward, clipping, optimiser
    store   the teacher's blocks up to the layer, inputs and targets to disk: paid once
    write   a token sampled from the teacher, as many side by side as in a repair with its defaults: paid once
    field   a step as it is usually done: the whole teacher runs on the batch, logits included, and the layer trains
            on its hooked input and output (LoLCATs, MOHAWK, RADLADS)

A repair that goes through its text E times and sampled a share W of it costs `(store + W write) / E + step` a token,
the field's way `field`. Sampling takes minutes, so only the first rounds sample.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import mismatch
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.ladder_stages.activation_store import Example, Store
from mismatch.stages.repair.ladder_stages.local import LocalLoss, groups
from mismatch.stages.repair.ladder_stages.loss import relative_error
from mismatch.stages.repair.ladder_stages.module_pair import pairs_of, watch
from mismatch.stages.repair.ladder_stages.training import Trained, Trainer
from mismatch.stages.repair.self_generated import Writer

SWAP = "layer12:infini(segment=64)"
STEPS = 4  # timed together in a round
WRITING = 2  # rounds that sample
MOST = 1.2
"""A step over the layer's own forward and backward."""
CHEAPER = 10
"""The field's way over the repair."""
WORDS = {
    "layer": "the layer alone, forward and backward",
    "step": "a step of the stage local",
    "store": "the teacher up to the layer, once",
    "write": "a token sampled from the teacher, once",
    "field": "the usual step: the whole teacher runs",
}
HERE = Path(__file__).resolve().parent.parent / "figures" / "benchmark_repair"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer tokens: a look, not a claim")
    parser.add_argument("--model", default="smollm2", help="what to repair")
    parser.add_argument("--swap", default=SWAP, help="one attention layer")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seq_len, rounds = (256, 2) if args.quick else (1024, args.rounds)
    config = RepairConfig(model=args.model, swap=(args.swap,), seq_len=seq_len)
    if args.quick:
        config = replace(config, train_tokens=32 * seq_len)
    report(args, times(config, rounds), config)


def times(config: RepairConfig, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds a token of each way, one number a round."""
    teacher, seq_len = mismatch.load(config.model), config.seq_len
    layout = teacher.layout
    cut = mismatch.windows(
        mismatch.read_documents("sotu"), teacher.tokenizer, seq_len, STEPS * seq_len, 0
    )
    batches = [torch.from_numpy(b.ids) for b in cut.batches(1)]
    student = mismatch.swap(teacher, *config.swap)
    part = pairs_of(layout, student)[0]
    fresh = {clause.path: set(clause.new_parameters) for clause in student.plan.clauses}
    writer = Writer(teacher.model, teacher.tokenizer, seq_len, seed=config.seed)
    found: dict[str, list[float]] = {way: [] for way in WORDS}
    with tempfile.TemporaryDirectory() as folder:
        filled = [_store(layout, part, batches, Path(folder) / str(n)) for n in range(rounds + 2)]
        store = filled[0]
        store.fill()
        filled[1].fill()
        learning = groups(part, fresh[part.path], config.lr, config.gate_lr)
        for group in learning:
            group.joins = 0.0
            for parameter in group.parameters.values():
                parameter.requires_grad_(True)
        memory = [store.batch(part, index) for index in range(STEPS)]
        steps = _trainer(learning, LocalLoss(part, store, store), batches)
        usual = _trainer(learning, _Live(layout, part, batches), batches)
        ways: dict[str, Callable[[], Any]] = {
            "layer": lambda: _alone(part, memory),
            "step": lambda: [steps._step(Trained(steps=n)) for n in range(STEPS)],
            "field": lambda: [usual._step(Trained(steps=n)) for n in range(STEPS)],
        }
        for run in ways.values():
            run()  # imports and allocations of the first use belong to nobody
        tokens = STEPS * seq_len
        for number in range(rounds):
            for way, run in ways.items():
                found[way].append(1e3 * spent(run) / tokens)
            found["store"].append(1e3 * spent(filled[number + 2].fill) / tokens)
            if number < WRITING:
                sampling = spent(lambda: writer.write(config.to_generate))
                found["write"].append(1e3 * sampling / config.to_generate)
            said = ", ".join(f"{way} {values[-1]:.3f}" for way, values in found.items())
            print(f"round {number + 1}, CPU-ms a token: {said}", file=sys.stderr)
    return found


class _Live:
    """The field's loss: the whole teacher runs on the batch."""

    def __init__(self, layout: Any, part: Any, batches: list[torch.Tensor]) -> None:
        self.layout, self.part, self.batches = layout, part, batches

    def __call__(self, index: int, rows: int) -> torch.Tensor:
        seen: dict[str, Any] = {}
        last = self.layout.n_layers - 1
        x, y, call = watch(self.layout, [self.part.path], self.batches[index], last=last)[
            self.part.path
        ]
        with torch.no_grad():  # the teacher is called as a model: its logits are made, and left
            seen["logits"] = self.layout.head(x)
        return relative_error(call(self.part.student, x), y)

    def look(self) -> float:
        return 0.0


def _store(layout: Any, part: Any, batches: list[torch.Tensor], folder: Path) -> Store:
    return Store(layout, [part], batches, folder=folder, budget=1e9)


def _trainer(learning: Any, loss: Any, batches: list[torch.Tensor]) -> Trainer:
    return Trainer(learning, loss, loss.look, batches=batches, steps=10**6, every=10**6)


def _alone(part: Any, examples: list[Example]) -> None:
    for example in examples:
        example.call(part.student, example.x).square().mean().backward()
        for parameter in part.student.parameters():
            parameter.grad = None


def spent(run: Callable[[], object]) -> float:
    """CPU seconds."""
    start = time.process_time()
    run()
    return time.process_time() - start


def report(args: argparse.Namespace, found: dict[str, list[float]], config: RepairConfig) -> None:
    """Verdict, csv, json and the picture."""
    args.output.mkdir(parents=True, exist_ok=True)
    median = {way: float(np.median(values)) for way, values in found.items()}
    ratios = np.array(found["step"]) / np.array(found["layer"])
    with open(args.output / "cost.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("way", "what", "round", "cpu_ms_per_token"))
        for way, values in found.items():
            writer.writerows((way, WORDS[way], n + 1, value) for n, value in enumerate(values))
    epochs = config.epochs
    costs = {
        share: {e: _whole(median, e, share) for e in (1, epochs)}
        for share in (0.0, config.self_generated)
    }
    made = {
        "model": args.model,
        "swap": args.swap,
        "seq_len": config.seq_len,
        "medians": median,
        "step_over_layer": [float(r) for r in ratios],
        "epochs": epochs,
        "self_generated": config.self_generated,
        "field_over_repair": median["field"] / costs[config.self_generated][epochs],
        "field_over_repair_of_given_text": median["field"] / costs[0.0][epochs],
        "threads": 1,
        "versions": mismatch.versions(),
    }
    (args.output / "cost.json").write_text(json.dumps(made, indent=2) + "\n")
    figure(median, config).savefig(args.output / "cost.png", dpi=200)
    step = float(np.median(ratios))
    print(
        f"step / layer: {step:.3f} ({'holds' if step <= MOST else 'does not hold'}: at most {MOST})"
    )
    for share, by_epochs in costs.items():
        for e, whole in by_epochs.items():
            ratio = median["field"] / whole
            word = (
                ""
                if e == 1
                else f" ({'holds' if ratio >= CHEAPER else 'does not hold'}: {CHEAPER})"
            )
            print(
                f"field / repair, {e} times through the text, {share:.0%} self-generated: {ratio:.1f}{word}"
            )


def _whole(median: dict[str, float], epochs: int, generated: float) -> float:
    """Of a repair, a token."""
    return (median["store"] + generated * median["write"]) / epochs + median["step"]


def figure(median: dict[str, float], config: RepairConfig) -> Figure:
    """Bars on one scale."""
    times_through = f"{config.epochs} times through the text"
    bars = [
        *((WORDS[way], median[way]) for way in ("layer", "step", "store", "write")),
        (f"the whole repair, {times_through}", _whole(median, config.epochs, 0.0)),
        (
            f"the whole repair, {config.self_generated:.0%} of its text self-generated",
            _whole(median, config.epochs, config.self_generated),
        ),
        (WORDS["field"], median["field"]),
    ]
    picture = Figure(figsize=(7.0, 3.0), layout="constrained")
    ax = picture.subplots()
    for at, (_words, value) in enumerate(bars):
        ax.barh(at, value, color="#0072b2" if at != len(bars) - 1 else "#999999", height=0.7)
        ax.annotate(
            f"{value:.2f}", (value, at), xytext=(3, 0), textcoords="offset points", va="center"
        )
    ax.set_yticks(range(len(bars)), [words for words, _ in bars])
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlim(0, 1.12 * max(value for _, value in bars))
    ax.set_xlabel("CPU milliseconds a token, one thread")
    ax.set_title(f"What repair costs, {config.swap[0]}, {config.model}", loc="left", fontsize=9)
    return picture


if __name__ == "__main__":
    main()
