"""Gates: one number a layer says how much of the layer's own module the answers need, learnt by gradient.

    y = g kept(x) + (1 - g) replaced(x)         for every layer of --among at once; g begins at 1 and stays in [0, 1]
    loss = KL(teacher || student) at the tokens of answers, mean + PRICE sum of g

All weights are frozen. What keeps the answers stays open, the rest closes at the price; the score of a layer is the
mean of its gate over the second half of the steps, so that of two that closed, the one that stood open longer is
dearer. Learnt twice, on each half of the prompts: what the halves agree on is how sure it is.

Source: FlashMorph, arXiv 2606.30562 (answers, its price and rates), in hundreds of steps instead of thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mismatch.errors import NumericsError
from mismatch.forward import hooks
from mismatch.forward.head import mean_kl
from mismatch.mechanisms.parts.calling import first_of, with_first
from mismatch.runs.plan import SwapPlan
from mismatch.runs.table import SWAP
from mismatch.stages.scan.batches import prove
from mismatch.stages.scan.cells import Cell
from mismatch.stages.scan.sweep import Sweep
from mismatch.stages.scan.tasks import Task
from mismatch.surgery.operate import Student, beside, replace

PRICE = 0.1
"""Of an open gate, in nats."""
RATES = (2e-2, 2e-3)
"""Of Adam, first and last; linear in between."""
STEPS = 128
"""Of each half of the prompts, a batch each. A gate moves by a rate at most, so closing takes 70."""

Batch = tuple[np.ndarray, np.ndarray]
"""Ids and where answers are predicted, `rows pos` each."""


def learnt(
    sweep: Sweep,
    cells: Sequence[Cell],
    tasks: Sequence[Task],
    batch_tokens: int,
    progress: Callable[[int], None] = lambda steps: None,
) -> np.ndarray:
    """Float64 `halves cells`: how far each layer's gate stood open.

    Args:
        sweep: with an empty tree; afterwards all cells are in it.
        cells: one mechanism, each layer that may be replaced, lowest first.
        tasks: of answers, which the teacher can give.
        batch_tokens: tokens that run together.
        progress: told how many steps were done.

    Raises:
        NumericsError: a loss is not finite.
    """
    placements = tuple(p for cell in cells for p in cell.placements)
    prove(sweep, (Cell(SWAP, None, placements, cells[0].first),))
    student = sweep.base
    student.model.requires_grad_(False)  # also of the modules that are replaced now
    added = replace(student, placements, seed=sweep.seed, calibrations=sweep.calibrations)
    student.plan = SwapPlan(spec="", clauses=added)
    student.model.requires_grad_(False)
    gate_of = {cell.layer: at for at, cell in enumerate(cells)}
    found = []
    for half in halves(tasks, batch_tokens):
        gates = torch.ones(len(cells), requires_grad=True)
        with mixed(student, gates, gate_of):
            found.append(_closed(sweep, gates, half, progress))
    return np.stack(found)


def halves(tasks: Sequence[Task], batch_tokens: int) -> Iterator[list[Batch]]:
    """The prompts of even and of odd number in batches, one task after the other in turn."""
    for half in range(2):
        parts: list[list[Batch]] = []
        for task in tasks:
            ids, asked = task.ids[half::2], task.asked[half::2]
            size = max(1, batch_tokens // ids.shape[1])
            parts.append(
                [(ids[at : at + size], asked[at : at + size]) for at in range(0, len(ids), size)]
            )
        most = max(map(len, parts))
        yield [part[at] for at in range(most) for part in parts if at < len(part)]


def _closed(
    sweep: Sweep, gates: Tensor, batches: Sequence[Batch], progress: Callable[[int], None]
) -> np.ndarray:
    """Learn the gates; float64 `cells`, their mean over the second half of the steps."""
    first, last = RATES
    optimizer = torch.optim.Adam([gates], lr=first)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, last / first, STEPS)
    stood = torch.zeros_like(gates, dtype=torch.float64)
    for step, (ids, asked) in zip(range(STEPS), cycle(batches), strict=False):
        loss = misaligned(sweep, ids, asked) + PRICE * gates.sum()
        if not torch.isfinite(loss):
            raise NumericsError(
                f"with {len(gates)} layers partly replaced the KL of answers is not finite, at step {step}",
                hint="narrow --among, or take --score kl",
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        with torch.no_grad():
            gates.clamp_(0.0, 1.0)
            if step >= STEPS // 2:
                stood += gates
        progress(1)
    return (stood / (STEPS - STEPS // 2)).numpy()


def misaligned(sweep: Sweep, ids: np.ndarray, asked: np.ndarray) -> Tensor:
    """KL to the teacher at the predictions asked for, mean, nats per token; a scalar on the CPU with a gradient."""
    tokens = hooks.on_device(sweep.teacher, ids)
    rows = torch.from_numpy(asked.ravel().nonzero()[0])
    with torch.no_grad():
        theirs = hooks.run(sweep.teacher, tokens).flatten(0, 1)
        theirs = theirs[rows.to(theirs.device)]
    layout = sweep.base.layout
    ours = hooks.run(layout, tokens).flatten(0, 1)
    return mean_kl(sweep.teacher, theirs, layout, ours[rows.to(ours.device)]).cpu()


@contextmanager
def mixed(student: Student, gates: Tensor, gate_of: dict[int | None, int]) -> Iterator[None]:
    """Each replaced module of a student gives its own share and that of the original while the context lives."""
    with ExitStack() as stack:
        for layer, original, module in beside(student):
            hook = _mixing(original, gates, gate_of[layer])
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _mixing(original: nn.Module, gates: Tensor, at: int) -> Callable[..., Any]:
    def mix(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        replaced, kept = first_of(output), first_of(original(*args, **kwargs))
        share = gates[at].to(kept.device, kept.dtype)
        return with_first(output, share * kept + (1 - share) * replaced)

    return mix
