"""Every command by one process, by two ranks and by three: are the numbers the same, and what does it cost?

    python analyses/benchmark_ranks.py                  SmolLM2; long, and wants a quiet machine
    python analyses/benchmark_ranks.py --only repair    one command; what others wrote stays
    python analyses/benchmark_ranks.py --quick          the toy: whether it runs, not what it costs

Each run is a command line of its own, under torchrun where there are several ranks, with one thread a rank. CPU
seconds are those of all its processes, torchrun's own and every rank's imports and loading included; wall is from start
to end. With more ranks than cores the wall says little. Each row is compared with that of one process; of a repair and
a training also the weights of the checkpoint.

A training by w ranks has w times the batch of one, so one process is given that batch here.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import mismatch

HERE = Path(__file__).resolve().parent.parent / "figures" / "benchmark_ranks"
WORLDS = (1, 2, 3)
SMALL = 1e-3
"""A value below it counts as so much, where differences are relative: many are 0 but for rounding."""
TEXT = ("--data", "wiki", "--seed", "0")
REPAIR = ("--self-generated", "0.25", "--max-minutes", "none", "--epochs", "1", "--min-gain", "0", "--controls", "zero",
          "--probes", "induction", "--trace-tokens", "1024", "--val-tokens", "1024")  # fmt: skip
FIELDS = ("command", "ranks", "cpu_seconds", "wall_seconds", "rows", "worst", "of", "weights")
COMMANDS = {
    "trace": ("trace", "--swap", "{one}", "--tokens", "{text}"),
    "scan": ("scan", "--swap", "sliding_window(64, 1)", "--tokens", "{short}", "--samples", "4",
             "--among", "{among}"),
    "probe": ("probe", "--swap", "{one}", "--probes", "induction,order_sensitivity,generation"),
    "diagnose": ("diagnose", "--swap", "{one}", "--tokens", "{short}", "--fit-tokens", "{short}"),
    "plan": ("plan", "--mechanism", "sliding_window(64, 1)", "--layers", "4", "--tokens", "{short}",
             "--selection-tokens", "{short}", "--samples", "4", "--among", "{among}"),
    "repair": ("repair", "--swap", "{one}", *REPAIR, "--tokens", "{short}", "--train-tokens", "{text}",
               "--batch-size", "6"),
    "repair, two layers jointly": ("repair", "--swap", "{two}", *REPAIR, "--tokens", "{short}", "--train-tokens",
                                   "{text}", "--batch-size", "1", "--order", "joint", "--stages",
                                   "closed-form,local,block"),
    "train": ("train", "--swap", "{one}", "--tokens", "{short}", "--train-tokens", "{text}", "--val-tokens", "{short}",
              "--trainer", "max_steps=6", "--batch-size", "{batch}"),
}  # fmt: skip
REAL = {"model": "smollm2", "one": "layer12:infini(segment=64)", "two": "layers[12,20]:infini(segment=64)",
        "text": "6144", "short": "2048", "seq_len": "512", "among": "8-19"}  # fmt: skip
TOY = {"model": "glassllm", "one": "layer2:infini(segment=16)", "two": "layers[1,2]:infini(segment=16)",
       "text": "1152", "short": "1024", "seq_len": "64", "among": "0-3"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the toy: whether it runs")
    parser.add_argument("--only", choices=COMMANDS, nargs="*", help="these commands")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    found = kept(args.output / "ranks.csv")
    for name in args.only or COMMANDS:
        found = [row for row in found if row["command"] != name]
        found += measured(name, TOY if args.quick else REAL)
        found.sort(key=lambda row: [*COMMANDS].index(row["command"]))
        write(args.output / "ranks.csv", found)


def measured(name: str, sizes: dict[str, str]) -> list[dict[str, Any]]:
    """One row for each number of ranks."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mismatch-") as folder:
        for world in WORLDS:
            run = Path(folder) / str(world)
            cpu, wall = spent(words(name, sizes, world, run), world)
            # Of a training one process with the batches of all ranks.
            same = Path(folder) / ("1" if name != "train" or world == 1 else f"like{world}")
            if name == "train" and world > 1:
                spent(words(name, sizes, 1, same, batch=world), 1)
            row = {"command": name, "ranks": world, "cpu_seconds": round(cpu, 1)}
            row |= {"wall_seconds": round(wall, 1), **compared(same, run)}
            rows.append(row)
            print(row, file=sys.stderr)
            if world > 1:
                shutil.rmtree(run)
    return rows


def words(
    name: str, sizes: dict[str, str], world: int, run: Path, batch: int = 1
) -> tuple[str, ...]:
    """The command line behind `python`."""
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", str(world)) if world > 1 else ()
    given = [word.format(**sizes, batch=batch) for word in COMMANDS[name]]
    rest = ("--model", sizes["model"], "--seq-len", sizes["seq_len"], "--device", "cpu", "--quiet")
    return (*launch, "-m", "mismatch", *given, *rest, *TEXT, "--output", str(run))


def spent(line: tuple[str, ...], world: int) -> tuple[float, float]:
    """CPU and wall seconds of a command.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        (sys.executable, *line), env=env, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"{world} ranks: {' '.join(line)}\n{done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.monotonic() - began


def compared(one: Path, several: Path) -> dict[str, Any]:
    """How many rows there are, the largest difference of a value, relative, which it is, and that of a weight.

    Raises:
        RuntimeError: they are not the same rows.
    """
    numbers = ["value", "lo", "hi"]
    tables = [mismatch.load_run(str(run)).table for run in (one, several)]
    names = [table.drop(columns=[*numbers, "run_id"]) for table in tables]
    if not names[0].equals(names[1]):
        raise RuntimeError(f"the rows of {one} and {several} are not the same ones")
    first, second = (table["value"].to_numpy(float) for table in tables)
    off = np.abs(first - second) / np.maximum(np.abs(first), SMALL)
    row = tables[0].iloc[at := int(np.nanargmax(off))]
    return {
        "rows": len(first),
        "worst": float(off[at]),
        "of": f"{row['student']} {row['metric']} {row['stat']}" if off[at] else "",
        "weights": weights(one, several),
    }


def weights(one: Path, several: Path) -> float | str:
    """The largest difference of a weight of both checkpoints; "" without one."""
    files = [run / "checkpoint" / "model.safetensors" for run in (one, several)]
    if not files[0].exists():
        return ""
    first, second = (mismatch.load(str(file.parent)).model.state_dict() for file in files)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def kept(path: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
