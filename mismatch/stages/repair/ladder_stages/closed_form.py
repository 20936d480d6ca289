"""The stage `closed-form`: what needs no gradient. A pass over stored inputs and targets, sums, one small system.

Gates first. Where a mechanism blends two branches by sigmoid(gate), its output is affine in the shares g, so

    min_g  sum_t w_t ||o_t(0) + sum_h g_h u_th - y_t||^2,  SMALLEST <= g_h <= 1 - SMALLEST     (scipy's bounded lsq)

with o(0) the output at all shares 0, u_h what share h adds (read off by running the module with one share at 1), y what
the teacher's module gives. Then the output projection. A module that ends in a linear map keeps everything before it,
and the map is fitted anew by ridge regression towards the weights it had:

    min_W  sum_t w_t ||W h_t - y_t||^2 + lambda ||W - W_0||^2         h_t: what enters the map in the student

solved as (A + lambda I) W' = B + lambda W_0', A = sum w h h', B = sum w h y', with w_t of `weighing`. lambda is the one
of a grid that errs least on held-out text of another source; a fit that errs more there than what was there is not
taken. A mechanism that has a better closed form (DyT's slope, gain and bias) gives it by `refit`. Where new parameters
train alone first (`Mechanism.new_first`), the projection stays as it is: it would be fitted to what they are to change.

The sums are float64. Memory: two matrices of the map's width squared.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mismatch.mechanisms.base import trains_new_first
from mismatch.runs.ranks import Ranks
from mismatch.stages.repair.ladder_stages.activation_store import Example, Store
from mismatch.stages.repair.ladder_stages.loss import weights
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair, tensors_of
from mismatch.stages.repair.ladder_stages.places import Places
from mismatch.stages.repair.ladder_stages.stage_result import StageResult

if TYPE_CHECKING:
    from mismatch.stages.repair.ladder import Ladder

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the mean of A's diagonal."""
SMALLEST = 0.02  # of a share: at 0 or 1 a gate would have no gradient left
Linear = nn.Linear | Conv1D
GATE_BATCHES = 8  # a handful of shares needs few tokens


@dataclass(frozen=True)
class Fit:
    """What a closed form did. Errors are relative (see `weighing`), on batches that it did not see."""

    what: str
    before: float
    after: float

    @property
    def taken(self) -> bool:
        return self.after < self.before


class Sums:
    """A, B and the size of the targets."""

    def __init__(self) -> None:
        self.hh = torch.zeros((), dtype=torch.float64)
        self.hy = torch.zeros((), dtype=torch.float64)
        self.yy = 0.0

    def add(self, h: Tensor, y: Tensor) -> None:
        weight = weights(y).flatten().double()[:, None]
        h, y = h.flatten(0, -2).double(), y.flatten(0, -2).double()
        self.hh = self.hh + h.T @ (weight * h)
        self.hy = self.hy + h.T @ (weight * y)
        self.yy += float((weight * y.square()).sum())

    def of_all(self, ranks: Ranks, matrix: Tensor) -> Sums:
        """The sums of all ranks, of a map like `matrix`, `in out`; those of a rank without text are 0."""
        whole, size = Sums(), len(matrix)
        whole.hh = ranks.added(self.hh.to(matrix.device).expand(size, size))
        whole.hy = ranks.added(self.hy.to(matrix.device).expand(size, matrix.shape[1]))
        whole.yy = float(ranks.added(torch.tensor(self.yy, dtype=torch.float64)))
        return whole

    def error(self, w: Tensor) -> float:
        """Relative error of outputs `h @ w`."""
        lost = (w * (self.hh @ w)).sum() - 2 * (w * self.hy).sum() + self.yy
        return float(lost) / self.yy


def closed_forms(ladder: Ladder, name: str) -> StageResult:
    """Fit what can be fitted in every part."""
    places = Places.of(ladder, ladder.parts)

    def fit(stage: StageResult, _at: int, part: ModulePair) -> None:
        started = time.monotonic()
        store, held = ladder.stores([part], [part], ranks=places.together)
        for found in closed_form(part, store, held):
            done = "taken" if found.taken else "not taken"
            errors = f"{found.before:.3f} -> {found.after:.3f}"
            stage.notes.append(f"{part.where} {found.what}: error {errors}, {done}")
        stage.tokens = sum(ids.numel() for ids in ladder.texts.train)
        stage.seconds = time.monotonic() - started

    stage = places.run(StageResult(name), fit, tensors_of)
    if not stage.notes:
        stage.notes.append("nothing in these parts has a closed form")
    return stage


@torch.no_grad()
def closed_form(part: ModulePair, store: Store, held: Store) -> list[Fit]:
    """Fit what can be fitted, in order; empty when nothing in this part can.

    Args:
        part: owns its tensors.
        store: training inputs and targets; its ranks share the sums, but not a `refit`.
        held: of another source; they choose, and say what was gained.
    """
    refit = getattr(part.student, "refit", None)
    if refit is not None:
        before, state = _error(part, held), _copied(part)
        what = refit((example.x, example.y) for example in store.batches_of(part))
        return [_checked(part, held, what, before, state)]
    found = []
    gates = list(getattr(part.student, "gates", dict)().values())
    if gates:
        before, state = _error(part, held), _copied(part)
        _fit_gates(part, gates, store)
        found.append(_checked(part, held, "gates", before, state))
    linear = None
    if not trains_new_first(part.student):
        linear = last_linear(part, store.batch(part, 0))
    if linear is not None:
        found.append(_ridge(part, store, held, linear))
    return found


def _copied(part: ModulePair) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in part.student.state_dict().items()}


def _checked(
    part: ModulePair, held: Store, what: str, before: float, state: dict[str, Tensor]
) -> Fit:
    """What a fit gained; undone when it gained nothing."""
    fit = Fit(what, before, _error(part, held))
    if not fit.taken:
        part.student.load_state_dict(state)
    return fit


def _fit_gates(part: ModulePair, gates: Sequence[Tensor], store: Store) -> None:
    sizes = [gate.numel() for gate in gates]
    n = sum(sizes)

    def run(example: Example, shares: Tensor) -> Tensor:
        for gate, share in zip(gates, shares.split(sizes), strict=True):
            gate.copy_(torch.logit(share.view_as(gate), eps=1e-7))
        return example.call(part.student, example.x).to(example.y.dtype)

    system, right = np.zeros((n, n)), np.zeros(n)
    for index in range(min(GATE_BATCHES, len(store.batches))):
        if not store.ranks.mine(index):
            continue
        example = store.batch(part, index)
        root = weights(example.y).sqrt()[..., None]
        nothing = torch.zeros(n)
        bare = run(example, nothing)
        added = []
        for at in range(n):
            one = nothing.clone()
            one[at] = 1.0
            added.append(((run(example, one) - bare) * root).flatten())
        u = torch.stack(added)
        system += (u @ u.T).double().cpu().numpy()
        right += (u @ ((example.y - bare) * root).flatten()).double().cpu().numpy()
    system = store.ranks.added(torch.from_numpy(system)).numpy()
    right = store.ranks.added(torch.from_numpy(right)).numpy()
    # The normal equations as a least-squares problem of n rows: R'R = system.
    values, vectors = np.linalg.eigh(system)
    root_values = np.sqrt(np.clip(values, values.max() * 1e-10, None))
    matrix = root_values[:, None] * vectors.T
    shares = lsq_linear(
        matrix, (vectors.T @ right) / root_values, bounds=(SMALLEST, 1 - SMALLEST)
    ).x
    for gate, share in zip(gates, torch.from_numpy(shares).split(sizes), strict=True):
        gate.copy_(torch.logit(share).view_as(gate))


def last_linear(part: ModulePair, example: Example) -> Linear | None:
    """The linear map whose output is the module's own output; None where something comes after it."""
    outputs: dict[Linear, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, _a, out: outputs.__setitem__(m, out))
        for module in part.student.modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    try:
        output = example.call(part.student, example.x[:1])
    finally:
        for handle in handles:
            handle.remove()
    same = [m for m, out in outputs.items() if out is output or _one_storage(out, output)]
    return same[-1] if same else None


def _ridge(part: ModulePair, store: Store, held: Store, linear: Linear) -> Fit:
    fit, check = _summed(part, store, linear), _summed(part, held, linear)
    old = _matrix(linear).double()
    size = fit.hh.diagonal().mean()
    eye = torch.eye(len(old), dtype=torch.float64, device=old.device)
    tried = []
    for ridge in RIDGES:
        new = torch.linalg.solve(fit.hh + ridge * size * eye, fit.hy + ridge * size * old)
        tried.append((check.error(new), new))
    error, best = min(tried, key=lambda pair: pair[0])
    found = Fit("output projection", check.error(old), error)
    if found.taken:
        _write(linear, best)
    return found


def _summed(part: ModulePair, store: Store, linear: Linear) -> Sums:
    entering: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _m, args: entering.append(args[0]))
    sums = Sums()
    try:
        for example in store.share_of(part):
            entering.clear()
            example.call(part.student, example.x)
            h = entering[-1]
            if linear.bias is not None:
                h = torch.cat([h, torch.ones_like(h[..., :1])], dim=-1)
            sums.add(h, example.y)
    finally:
        handle.remove()
    return sums.of_all(store.ranks, _matrix(linear))


def _error(part: ModulePair, store: Store) -> float:
    """Relative error of the module over a text."""
    lost = whole = 0.0
    for example in store.share_of(part):
        weight = weights(example.y)
        output = example.call(part.student, example.x).to(example.y.dtype)
        lost += float((weight * (output - example.y).square().sum(-1)).sum())
        whole += float((weight * example.y.square().sum(-1)).sum())
    both = store.ranks.added(torch.tensor([lost, whole], dtype=torch.float64)).tolist()
    return both[0] / both[1]


def _matrix(linear: Linear) -> Tensor:
    """`in (+ 1 for the bias) out`."""
    w = linear.weight if isinstance(linear, Conv1D) else linear.weight.T
    return w if linear.bias is None else torch.cat([w, linear.bias[None]])


def _write(linear: Linear, matrix: Tensor) -> None:
    w = matrix if linear.bias is None else matrix[:-1]
    linear.weight.copy_(w if isinstance(linear, Conv1D) else w.T)
    if linear.bias is not None:
        linear.bias.copy_(matrix[-1])


def _one_storage(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape
