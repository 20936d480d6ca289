"""Whether the teacher can answer at all: without that, what a layer costs its answers says nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mismatch.errors import UsageError
from mismatch.forward import hooks
from mismatch.forward.head import scores
from mismatch.models.layout import Layout
from mismatch.report.style import number
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.plan.scores import ANSWERS, SCORES
from mismatch.stages.scan.tasks import Task
from mismatch.stages.scan.words import ABLE


@torch.no_grad()
def asked(
    teacher: Layout, tasks: Sequence[Task], batch_tokens: int
) -> dict[str, tuple[float, float]]:
    """By task of answers, what the teacher loses of them and what knowing nothing loses, as the task counts it."""
    found = {}
    for task in tasks:
        if task.name not in ANSWERS or task.chance is None:
            continue
        lost = 0.0
        for part, at, _ in task.batches(batch_tokens):
            ids = hooks.on_device(teacher, part)
            scored = torch.from_numpy(np.roll(at, 1, axis=1)).to(ids.device)
            lost -= float(scores(teacher, hooks.run(teacher, ids), ids, scored)[0].sum())
        count = len(task.ids) if task.summed else int(task.asked.sum())
        found[task.name] = (lost / count, task.chance)
    return found


def check(config: PlanConfig, reads: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
    """The tasks that a model can do: it loses at most so much of what knowing nothing loses.

    Args:
        config: what the choice needs.
        reads: as `asked` gives it.

    Raises:
        UsageError: the choice needs what the model cannot do.
    """
    able = tuple(task for task, (lost, chance) in reads.items() if lost <= ABLE * chance)
    if config.keep_retrieval and "passkey" not in able:
        raise UsageError(
            "--keep-retrieval, but the model itself does not find the passkey: there is nothing to keep",
            hint="a shorter --length may be easier; or leave --keep-retrieval out",
        )
    if SCORES[config.score].answers and not able:
        words = (
            f"of {task} it loses {number(lost)} nats, and knowing nothing {number(chance)}"
            for task, (lost, chance) in reads.items()
        )
        raise UsageError(
            f"--score {config.score} needs answers, and the model itself gives none: "
            + ("; ".join(words) or "no question can be put to it"),
            hint="a shorter --length may be easier; or take --score kl",
        )
    return able
