"""Trainings of the toy that die by SIGKILL: `python killed_training.py MOMENT:FOLDER... -- WORDS`.

A moment is `step-N`, behind the N-th step, or `saving-N`, inside the N-th save, between the weights and the rest of the
checkpoint. Each dies in a process of its own; all share one import of torch.
"""

from __future__ import annotations

import os
import signal
import sys

import torch

from mismatch import cli
from mismatch.stages import runner
from mismatch.stages.train.trainer import Course, DistillationTrainer


def plant(moment: str) -> None:
    """Make the process die at a moment."""
    where, _, number = moment.partition("-")
    owner, name = {
        "step": (Course, "on_step_end"),
        "saving": (DistillationTrainer, "_save_optimizer_and_scheduler"),
    }[where]
    real, calls = getattr(owner, name), []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    setattr(owner, name, counted)


def main(words: list[str]) -> None:
    at = words.index("--")
    torch.set_num_threads(1)
    runner.write_html = lambda _folder: None
    for planted in words[:at]:
        moment, _, folder = planted.partition(":")
        child = os.fork()
        if child == 0:
            plant(moment)
            os._exit(cli.main([*words[at + 1 :], "--output", folder]))
        _, status = os.waitpid(child, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"{moment} was not reached: status {status}")


if __name__ == "__main__":
    main(sys.argv[1:])
