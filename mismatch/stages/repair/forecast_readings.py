"""The forecast of one repair: read off before the first stage, with what repair has at that point.

The KL of swap and controls is measured in any case. The part's error, and what a linear map of its own output would
remove of it, cost one pass of the part alone over a few thousand activations that are stored already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mismatch import spec
from mismatch.forward.heldout import Evaluated
from mismatch.models.layout import HEADS
from mismatch.stages.repair import forecast
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.forecast import Foretold, Swap
from mismatch.stages.repair.ladder import Ladder
from mismatch.stages.repair.ladder_stages.activation_store import Example, Store
from mismatch.stages.repair.ladder_stages.closed_form import Sums
from mismatch.stages.repair.ladder_stages.inherit import INHERIT, taking
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair
from mismatch.surgery.students import Teacher

FITTED = 8192
"""Tokens that fit the linear map: as many as in the record."""
NONE_GENERATED = "the repairs of the record trained on given text alone, none of it self-generated"
TRAINED = "the repairs of the record began at a swap that was not trained"
INHERITED = "the repairs of the record had no stage `inherit`, and here it sets initial values"
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Towards the map that leaves the output as it is, in means of the diagonal; held-out text chooses."""


def foretell(
    config: RepairConfig, teacher: Teacher, ladder: Ladder, controls: Mapping[str, Evaluated]
) -> Foretold:
    """The forecast for each stage that is asked for.

    Args:
        config: the settings.
        teacher: the untouched model.
        ladder: that has begun, and has not run a stage.
        controls: on the same held-out text, in the same slot; what is missing is not used.
    """
    if config.student is not None:
        return Foretold({}, {}, "", TRAINED)
    if INHERIT in config.stages and any(taking(part) for part in ladder.parts):
        return Foretold({}, {}, "", INHERITED)
    layout, part = teacher.layout, ladder.parts[0]
    call = spec.format(config.swap_spec).partition(":")[2]
    some = any(clause.target.heads for clause in config.swap_spec.clauses)
    slot = HEADS if some else part.slot
    swap = Swap(call, slot, len(ladder.parts), layout.n_layers, layout.d_model, {})
    if forecast.outside(swap, forecast.shipped()) is None:  # else nothing needs to be measured
        with ladder.pace.uncounted():
            numbers = errors(part, *ladder.stores([part], [part]))
        if "zero" in controls:
            zero = controls["zero"].kl
            numbers["of_zero"] = ladder.swapped.kl.over(zero).value
        swap = replace(swap, numbers=numbers)
    told = forecast.foretell(swap, config.stages, config.train_tokens * config.epochs)
    if told.why_not is not None or not config.to_generate:
        return told
    return replace(told, note="; ".join(filter(None, (told.note, NONE_GENERATED))))


@torch.no_grad()
def errors(part: ModulePair, store: Store, held: Store) -> dict[str, float]:
    """`local_error`, `mapped_error`, `removed` of a part, on held-out inputs of the teacher; errors as in `weighing`.

    Args:
        part: as swapped.
        store: `FITTED` tokens of it fit the linear map of the part's own output.
        held: of another source.
    """
    fit, check = Sums(), Sums()
    count = math.ceil(FITTED / store.batches[0].numel())
    for index in range(min(count, len(store.batches))):
        fit.add(*_pair(part, store.batch(part, index)))
    for example in held.batches_of(part):
        check.add(*_pair(part, example))
    size = fit.hh.diagonal().mean()
    eye = torch.eye(len(fit.hh), dtype=torch.float64, device=fit.hh.device)
    asis = eye[:, :-1]
    maps = (
        torch.linalg.solve(fit.hh + ridge * size * eye, fit.hy + ridge * size * asis)
        for ridge in RIDGES
    )
    local = check.error(asis)
    mapped = min(local, *(check.error(one) for one in maps))
    removed = 1 - mapped / local if local > 0 else math.nan
    return {"local_error": local, "mapped_error": mapped, "removed": removed}


def _pair(part: ModulePair, example: Example) -> tuple[Tensor, Tensor]:
    """The part's output with a one behind it, for the bias, and the teacher's."""
    s = example.call(part.student, example.x).to(example.y.dtype)
    return torch.cat([s, torch.ones_like(s[..., :1])], dim=-1), example.y
