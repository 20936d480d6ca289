"""A training of the toy that dies by SIGKILL: `python killed_training.py MOMENT WORDS`.

A moment is `step-N`, behind the N-th step, or `saving-N`, inside the N-th save, between the weights and the rest of the
checkpoint.
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    runner.write_html = lambda _folder: None
    plant(sys.argv[1])
    sys.exit(cli.main(sys.argv[2:]))
