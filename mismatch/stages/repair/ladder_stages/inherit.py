"""The stage `inherit`: recurrent mixers get initial values from the attention that they replace, without a gradient.

One pass over some training windows measures the attention (`mismatch.mechanisms.parts.initial_values`); a mechanism
says which parts it has and how they are set (`TakesStatistics`), in the order of `PARTS`:

    keys             the mean key is taken out: softmax does not see it, a sum of outer products sees little else
    values           pass the convolution's SiLU where it is linear
    half-life        the state halves over the median distance of attention, the first token left out
    mean-half-life   the same with the mean distance, the first token included, as published
    write            how much of a value is written, one number for every token
    gate             as loud as the attention's heads are, token by token
    value-scale      sigma_h = <a_h, h_h> / <h_h, h_h> times what the head gives, as published

With nothing to set there is no such stage.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from mismatch.mechanisms.base import innermost
from mismatch.mechanisms.parts.initial_values import (
    Statistics,
    TakesStatistics,
    scale_values,
)
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair
from mismatch.stages.repair.ladder_stages.stage_result import StageResult

if TYPE_CHECKING:
    from mismatch.stages.repair.ladder import Ladder

INHERIT = "inherit"
SHARED = {"keys", "value-scale"}
"""Parts that change projections: not where an attention beside the mechanism reads the same ones."""
ENOUGH = 16_384
"""Training tokens that are measured: windows spread evenly over the training text."""


def taking(part: ModulePair) -> list[Any]:
    """The mechanisms of a part that set something, whatever stands around them."""
    modules = part.student.modules()
    return [m for m in modules if isinstance(m, TakesStatistics) and m.initial_values()]


@torch.no_grad()
def inherit(ladder: Ladder, name: str) -> StageResult:
    """Set what was asked for in every part that has it."""
    stage, started = StageResult(name), time.monotonic()
    batches, mean = ladder.texts.train, "mean-half-life" in ladder.config.initial_values
    every = max(1, sum(ids.numel() for ids in batches) // ENOUGH)
    for part in ladder.parts:
        for mechanism in taking(part):
            store, _ = ladder.stores([part], [part], every)
            asked = {*ladder.config.initial_values} | ({"half-life"} if mean else set())
            if innermost(part.student) is not mechanism:
                asked -= SHARED
            runs = [(example.x, example.call) for example in store.batches_of(part)]
            statistics = Statistics(mechanism, runs, "mean" if mean else "median")
            done = []
            for one, set_it in mechanism.initial_values().items():
                if one in asked:
                    set_it(statistics)
                    done.append(one)
            if "value-scale" in asked and scale_values(mechanism, statistics):
                done.append("value-scale")
            tokens = " ".join(f"{t:.0f}" for t in statistics.half_life(mechanism.n_heads))
            stage.notes.append(
                f"{part.where}: {', '.join(done) or 'nothing'} set; half-lives {tokens} tokens"
            )
            stage.tokens += sum(store.batches[index].numel() for index in store.chosen)
    stage.seconds = time.monotonic() - started
    return stage
