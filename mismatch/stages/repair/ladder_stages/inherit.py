"""The stage `inherit`: recurrent mixers get initial values from the attention that they replace, without a gradient.

One pass over some training windows measures the attention (`mismatch.mechanisms.parts.initial_values`); a mechanism
says which parts it has and how they are set (`TakesStatistics`), in the order of `PARTS`:

    keys             the mean key is taken out: softmax does not see it, a sum of outer products sees little else; where
                     the layer then errs less on validation text, which is so in SmolLM2 and not in the toy
    values           pass the convolution's SiLU where it is linear
    half-life        the state halves over the median distance of attention, the first token left out
    mean-half-life   the same with the mean distance, the first token included, as published
    write            how much of a value is written, one number for every token
    gate             as loud as the attention's heads are, token by token; of a codebook, far tokens as heavy as in it
    value-scale      sigma_h = <a_h, h_h> / <h_h, h_h> times what the head gives, as published

With nothing to set there is no such stage.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mismatch.mechanisms.base import innermost
from mismatch.mechanisms.parts.initial_values import (
    Statistics,
    TakesStatistics,
    scale_values,
)
from mismatch.stages.repair.ladder_stages.activation_store import Store
from mismatch.stages.repair.ladder_stages.closed_form import closed_form
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair, tensors_of
from mismatch.stages.repair.ladder_stages.places import Places
from mismatch.stages.repair.ladder_stages.stage_result import StageResult

if TYPE_CHECKING:
    from mismatch.stages.repair.ladder import Ladder

INHERIT, KEYS = "inherit", "keys"
SHARED = {KEYS, "value-scale"}
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
    batches, mean = ladder.texts.train, "mean-half-life" in ladder.config.initial_values
    every = max(1, sum(ids.numel() for ids in batches) // ENOUGH)
    places = Places.of(ladder, ladder.parts)

    def begin(stage: StageResult, _at: int, part: ModulePair) -> None:
        started = time.monotonic()
        for mechanism in taking(part):
            store, held = ladder.stores([part], [part], every, places.together)
            asked = {*ladder.config.initial_values} | ({"half-life"} if mean else set())
            if innermost(part.student) is not mechanism:
                asked -= SHARED
            runs = [(example.x, example.call) for example in store.batches_of(part)]
            statistics = Statistics(mechanism, runs, "mean" if mean else "median")
            done, why = _begun(part, mechanism, statistics, asked, store, held)
            tokens = " ".join(f"{t:.0f}" for t in statistics.half_life(mechanism.n_heads))
            stage.notes.append(
                f"{part.where}: {', '.join(done) or 'nothing'} set; half-lives {tokens} tokens{why}"
            )
            stage.tokens += sum(store.batches[index].numel() for index in store.chosen)
        stage.seconds = time.monotonic() - started

    return places.run(StageResult(name), begin, tensors_of)


def _begun(
    part: ModulePair,
    mechanism: Any,
    statistics: Statistics,
    asked: set[str],
    store: Store,
    held: Store,
) -> tuple[list[str], str]:
    """Set what was asked for; `keys` only where the part errs less with it, once its output is fitted.

    Returns:
        What was set, and a note on that choice.
    """
    start = _copied(part)
    done = _set(mechanism, statistics, asked)
    if KEYS not in done:
        return done, ""
    centred, error = _copied(part), _when_fitted(part, store, held)
    part.student.load_state_dict(start)
    others = _set(mechanism, statistics, asked - {KEYS})
    plain, without = _copied(part), _when_fitted(part, store, held)
    better = error < without
    part.student.load_state_dict(centred if better else plain)
    why = f"; error of the fitted output {error:.3f} with centred keys, {without:.3f} without"
    return (done if better else others), why


def _set(mechanism: Any, statistics: Statistics, asked: set[str]) -> list[str]:
    done = []
    for one, set_it in mechanism.initial_values().items():
        if one in asked:
            set_it(statistics)
            done.append(one)
    if "value-scale" in asked and scale_values(mechanism, statistics):
        done.append("value-scale")
    return done


def _when_fitted(part: ModulePair, store: Store, held: Store) -> float:
    """The error on validation text that the closed form would leave."""
    fits = closed_form(part, store, held)
    return min(fits[-1].before, fits[-1].after) if fits else math.inf


def _copied(part: ModulePair) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in part.student.state_dict().items()}
