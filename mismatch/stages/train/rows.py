"""What a training puts into the long table.

    stage    student    stat
    surgery  swap       mean, shift      before the training: KL, and NLL minus the teacher's; controls too
    train    swap       mean, shift      after `step` steps; of the step whose weights are kept with intervals
                        mean_minus_C     the trained model minus control C, or minus the swap as it was, paired
                        mean of rel_l2   of the stream leaving each layer

KL and NLL at `logits`, in nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mismatch.forward.heldout import Evaluated
from mismatch.metrics.sums.readings import Reading
from mismatch.stages.train.plan import StudentReading, TrainPlan

TRAINED = "trained"


def readings(evaluated: Mapping[str, Evaluated]) -> dict[str, StudentReading]:
    """Every student, and the trained one minus it, for plan.json."""
    last = evaluated[TRAINED]
    return {
        name: StudentReading(one.kl.mean()[:3], one.nll.mean()[:3], (last.kl - one.kl).mean()[:3])
        for name, one in evaluated.items()
    }


def rows_of(plan: TrainPlan, evaluated: Mapping[str, Evaluated]) -> list[dict[str, Any]]:
    """The rows of the table, without run id.

    Args:
        plan: with its looks.
        evaluated: every student on the evaluation text, the trained one under `trained`.
    """
    tokens = evaluated[TRAINED].kl.n
    found = []
    for name, one in evaluated.items():
        trained = name == TRAINED
        where = {
            "stage": "train" if trained else "surgery",
            "step": plan.step if trained else 0,
            "student": "swap" if trained else name,
        }
        for metric, stat, read in (("kl", "mean", one.kl.mean()), ("nll", "shift", one.nll.mean())):
            found.append({**_AT, **where, "metric": metric, **Reading.of(stat, read).as_row()})
        if not trained:
            less = Reading.of(f"mean_minus_{name}", (evaluated[TRAINED].kl - one.kl).mean())
            found.append(
                {
                    **_AT,
                    "stage": "train",
                    "step": plan.step,
                    "student": "swap",
                    "metric": "kl",
                    **less.as_row(),
                }
            )
    for look in plan.looks:
        at = {**_AT, "stage": "train", "step": look.step, "student": "swap", "n": tokens}
        if look.step != plan.step:
            found.append({**at, "metric": "kl", "stat": "mean", "value": look.kl})
            found.append({**at, "metric": "nll", "stat": "shift", "value": look.nll})
        for layer, shift in enumerate(look.shift):
            swapped = layer in plan.layers
            found.append(
                {
                    **at,
                    "site": "resid_post",
                    "layer": layer,
                    "swapped": swapped,
                    "metric": "rel_l2",
                    "stat": "mean",
                    "value": shift,
                }
            )
    return found


_AT = {"mode": "free", "site": "logits"}
