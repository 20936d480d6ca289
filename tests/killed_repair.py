"""Repairs of the toy that die by SIGKILL, each at a planted moment: `python killed_repair.py FOLDER MOMENT...`.

A moment is STAGE:N, the N-th step of a stage (in closed-form: batch), or `saving:N`, inside the N-th save of a state,
between its arrays and the file that makes them count. Each dies in a process of its own, in FOLDER/MOMENT; all of them
share one import of torch.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from wonderland import documents, jsonl

import mismatch
from mismatch.runs import state
from mismatch.stages import runner
from mismatch.stages.repair.ladder_stages import closed_form, training
from mismatch.stages.repair.ladder_stages.activation_store import Store

SWAP = "layer2:infini(segment=16)"
SETTINGS: dict[str, Any] = {
    "train_tokens": 384,
    "tokens": 192,
    "val_tokens": 96,
    "seq_len": 48,
    "batch_size": 2,
    "max_minutes": None,
    "epochs": 2,
    "min_gain": 0.0,
    "controls": (),
    "probes": (),
    "trace_tokens": 0,
}


def repaired(folder: Path, name: str, **settings: Any) -> Any:
    """The repair in FOLDER/NAME."""
    texts = {
        "data": str(jsonl(folder / "held_out.jsonl", documents(12))),
        "train_data": str(jsonl(folder / "train.jsonl", documents(8, seed=1))),
    }
    output = str(folder / name)
    return mismatch.repair("glassllm", SWAP, output=output, **(SETTINGS | texts | settings))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counted(function: Callable[..., Any], last: int, on: Callable[[], bool]) -> Callable[..., Any]:
    """The function; its call number `last`, of those made while `on()`, is not survived."""
    calls = 0

    def inside(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += on()
        if calls == last:
            die()
        return function(*args, **options)

    return inside


def plant(moment: str) -> None:
    """Make the process die at a moment."""
    where, _, number = moment.partition(":")
    # Every step is saved, so that resuming starts inside the stage and not at its beginning.
    training.Trainer.__init__.__kwdefaults__["save_every"] = 0.0
    if where == "saving":
        write = state._write
        whole = counted(write, int(number), lambda: True)
        state._write = lambda path, data: (whole if path.name == "state.json" else write)(
            path, data
        )
    elif where == "closed-form":
        inside = []
        real = closed_form.closed_form

        def fitted(*args: Any) -> Any:
            inside.append(True)
            yield from real(*args)

        closed_form.closed_form = fitted
        Store.batch = counted(Store.batch, int(number), lambda: bool(inside))
    else:
        step = training.Trainer._step

        def stepped(self: training.Trainer, done: training.Trained) -> bool:
            key = self.fingerprint["stage"]
            if where in (key.rpartition("-")[0], key) and done.steps == int(number):
                die()
            return step(self, done)

        training.Trainer._step = stepped


def main(folder: str, *moments: str) -> None:
    torch.set_num_threads(1)
    for moment in moments:
        child = os.fork()
        if child == 0:
            plant(moment)
            repaired(Path(folder), moment)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"{moment} was not reached: status {status}")


if __name__ == "__main__":
    runner.write_html = lambda _folder: None
    main(*sys.argv[1:])
