"""The stage `slots`: a budget of bytes, shared out among the kv heads of all parts that keep tokens by a score.

What a kv head loses with C slots is measured in its own layer, on the teacher's stream:

    E(C) = mean over far-reading tokens of || W_o,h (a_C - a) ||^2 / || stream ||^2

a_C: the head's output with C slots chosen by the scores as trained, a: the teacher's, W_o,h: the head's columns of the
output projection. Where the block norms what attention gives before it adds it (Gemma, OLMo 2), the difference is that
behind this norm: || N(y + W_o,h (a_C - a)) - N(y) ||, y all that the teacher's attention gives. Slots then go, always
to the head whose error falls most per slot, up the concave hull of its curve (so that a head whose first 32 slots help
little and whose next 32 help much is not passed by), until the bytes are used. The budget is an order: this stage is
never undone. That errors of layers add up is an assumption, and so is that a head which retrieves shows it here:
retrieval-shaped training text makes it show.

Heads of equal slots everywhere are what this is to be compared with: KV budgets by head are what LKV (arXiv 2605.06676,
abstract) calls the largest single gain.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mismatch.errors import UsageError
from mismatch.mechanisms.parts.slots import Slots
from mismatch.mechanisms.parts.some_heads import SomeHeads
from mismatch.models.layout import Layout
from mismatch.runs.ranks import ALONE, Ranks
from mismatch.stages.repair.ladder_stages.block_window_kl import block
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair, watch
from mismatch.stages.repair.ladder_stages.stage_result import StageResult
from mismatch.surgery.operate import Student
from mismatch.surgery.rewritten import rewrite

if TYPE_CHECKING:
    from mismatch.stages.repair.ladder import Ladder

SLOTS = "slots"
LEVELS = (0, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Numbers of slots that are tried, as far as a window has far tokens."""
TOKENS = 4096
"""Training text that the curves are measured on: whole batches, spread evenly over it, two at least."""


@dataclass(frozen=True)
class Keeper:
    """A part, and the one mechanism in it that has slots."""

    part: ModulePair
    mechanism: Any
    """A `Choosing` with slots."""

    @property
    def choice(self) -> Slots:
        found: Slots = self.mechanism.choice
        return found

    def bytes_with(self, slots: int) -> int:
        """Bytes of one text's state with so many slots in one kv head and none in the others."""
        with self.having((slots,) + (0,) * (len(self.choice.counts) - 1)):
            found: int = self.mechanism.state_bytes()
            return found

    @property
    def bytes_per_slot(self) -> int:
        return self.bytes_with(2) - self.bytes_with(1)

    def set(self, counts: tuple[int, ...]) -> None:
        """Give each kv head so many slots from now on."""
        self.mechanism.set_slots(counts)

    @contextmanager
    def having(self, counts: tuple[int, ...]) -> Iterator[None]:
        before = self.choice.counts
        self.set(counts)
        try:
            yield
        finally:
            self.set(before)


def keepers(parts: Sequence[ModulePair]) -> list[Keeper]:
    """The parts that have slots.

    Raises:
        UsageError: there is none; or a part with several such mechanisms, or with slots for some of its heads.
    """
    found = []
    for part in parts:
        if any(isinstance(inner, SomeHeads) for inner in part.student.modules()):
            raise UsageError(
                f"--state-bytes shares out slots among all kv heads of a layer, and {part.where} swaps some heads",
                hint="give `slots` in the swap, and leave --state-bytes out",
            )
        inside = [
            m for m in part.student.modules() if isinstance(getattr(m, "choice", None), Slots)
        ]
        if len(inside) > 1:
            raise UsageError(
                f"{part.where} holds {len(inside)} mechanisms with slots; --state-bytes knows one a layer",
                hint="give `slots` in the swap, and leave --state-bytes out",
            )
        found += [Keeper(part, one) for one in inside]
    if not found:
        raise UsageError(
            "--state-bytes shares out slots, and no mechanism of the swap has any",
            hint='swap in such a mechanism: --swap "all:kv_slots"',
        )
    return found


def slots(ladder: Ladder, name: str) -> StageResult:
    """Share out `--state-bytes`, and write what was chosen into the student's swap."""
    stage, started = StageResult(name), time.monotonic()
    kept, budget = keepers(ladder.parts), ladder.config.state_bytes
    assert budget is not None  # without it there is no such stage
    counts = shared_out(ladder.teacher, kept, ladder.texts.train, budget, ladder.ranks)
    give(ladder.student, kept, counts)
    stage.slots = {str(keeper.part.layer): list(keeper.choice.counts) for keeper in kept}
    used = sum(keeper.mechanism.state_bytes() for keeper in kept)
    heads = "; ".join(f"layer {at}: {' '.join(map(str, own))}" for at, own in stage.slots.items())
    stage.notes.append(f"{used:,} of {budget:,} bytes of state; slots of each kv head, {heads}")
    stage.tokens = sum(ids.numel() for ids in _spread(ladder.texts.train))
    stage.seconds = time.monotonic() - started
    return stage


def give(student: Student, kept: Sequence[Keeper], counts: Mapping[int, tuple[int, ...]]) -> None:
    """Give every part its slots for good, and record them in plan and checkpoint."""
    for keeper in kept:
        keeper.set(counts[keeper.part.layer])
        if not any(keeper.choice.counts):
            keeper.choice.net = None  # as it is rebuilt from the text
    rewrite(student, "slots", counts)


def shared_out(
    teacher: Layout,
    kept: Sequence[Keeper],
    batches: Sequence[Tensor],
    budget: int,
    ranks: Ranks = ALONE,
) -> dict[int, tuple[int, ...]]:
    """Slots of each kv head by layer, within the budget.

    Args:
        teacher: of whose stream and outputs the errors are measured.
        kept: whose slots; nothing else of them may have been trained yet.
        batches: training text, int64 `batch pos` each.
        budget: bytes of one text's state, what is held beside the slots included.
        ranks: who shares the batches.
    """
    curves = measured(teacher, kept, batches, ranks)
    costs = {keeper.part.layer: keeper.bytes_per_slot for keeper in kept}
    return climbed(curves, costs, budget - least(kept))


def check_budget(kept: Sequence[Keeper], budget: int) -> None:
    """Refuse a budget that nothing fits into.

    Raises:
        UsageError: it does not hold what is there without slots.
    """
    if budget < (needed := least(kept)):
        raise UsageError(
            f"--state-bytes {budget:,} is less than {needed:,}: what {len(kept)} modules hold of a text beside slots",
            hint="give more, or a smaller `segment` or `overlap`",
        )


def least(kept: Sequence[Keeper]) -> int:
    """Bytes of one text's state beside the slots."""
    return sum(keeper.bytes_with(1) - keeper.bytes_per_slot for keeper in kept)


@torch.no_grad()
def measured(
    teacher: Layout, kept: Sequence[Keeper], batches: Sequence[Tensor], ranks: Ranks = ALONE
) -> dict[int, Tensor]:
    """E of each kv head at each of `LEVELS` that the windows allow: by layer, float64 `KV levels`."""
    chosen = _spread(batches)

    def of(ids: Tensor) -> dict[int, Tensor]:
        found = {}
        blocks = {keeper.part.layer: block(teacher, keeper.part.layer) for keeper in kept}
        paths = [keeper.part.path for keeper in kept] + [b.path for b in blocks.values()]
        seen = watch(teacher, paths, ids, last=max(blocks))
        for keeper in kept:
            layer = keeper.part.layer
            x, y, call = seen[keeper.part.path]
            stream = seen[blocks[layer].path][0]
            added = _added(teacher, layer, y)
            with heads_of(keeper.part.teacher, keeper.mechanism._output) as whole:
                call(keeper.part.teacher, x)
            errors = [
                _errors(keeper, whole[0], call, x, stream, added, level)
                for level in _levels(keeper, ids)
            ]
            found[layer] = torch.stack(errors, dim=1).cpu() / len(chosen)
        return found

    parts = ranks.shared(chosen, of)
    # In the order of the batches: the same bits however many ranks there are.
    return {layer: torch.stack([part[layer] for part in parts]).sum(0) for layer in parts[0]}


def _spread(batches: Sequence[Tensor]) -> list[Tensor]:
    most = max(2, TOKENS // batches[0].numel())
    return list(batches[:: max(1, len(batches) // most)][:most])


def _levels(keeper: Keeper, ids: Tensor) -> list[int]:
    far = ids.shape[1] - keeper.choice.size * keeper.choice.overlap - keeper.choice.sinks
    return [level for level in LEVELS if level < max(1, far)]


def _added(teacher: Layout, layer: int, y: Tensor) -> Callable[[Tensor], Tensor]:
    """What the stream moves by when the output `y` of an attention, `batch pos d_model`, moves by so much."""
    path = teacher.site_path(layer, "attn_out")
    if path == teacher.slot_paths(layer)["attn"]:
        return lambda moved: moved
    norm = teacher.blocks[layer].get_submodule(path)
    return lambda moved: norm(y + moved) - norm(y)


def _errors(
    keeper: Keeper,
    whole: Tensor,
    call: Any,
    x: Tensor,
    stream: Tensor,
    added: Callable[[Tensor], Tensor],
    level: int,
) -> Tensor:
    """E of each kv head with so many slots: float64 `KV`."""
    mechanism, heads = keeper.mechanism, len(keeper.choice.counts)
    with keeper.having((level,) * heads), heads_of(mechanism, mechanism._output) as got:
        call(mechanism, x)
    off = (got[0] - whole).unflatten(-1, (heads, -1))
    # A row for each kv head, in which the others are silent.
    alone = torch.eye(heads, dtype=off.dtype, device=off.device)[:, None, None, :, None] * off
    project = getattr(mechanism, mechanism._output)
    moved = project(alone.flatten(-2)) - project(torch.zeros_like(whole[:1, :1]))  # without bias
    error = added(moved).double().square().sum(-1) / stream.double().square().sum(-1)
    far = keeper.choice.size * (keeper.choice.overlap + 1)
    return error[..., far:].mean((1, 2))


@contextmanager
def heads_of(module: nn.Module, output: str) -> Iterator[list[Tensor]]:
    """What an attention gives its output projection while the context lives: `batch pos H*D` each."""
    seen: list[Tensor] = []
    projection = module.get_submodule(output)
    handle = projection.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def climbed(
    curves: Mapping[int, Tensor], costs: Mapping[int, int], budget: int
) -> dict[int, tuple[int, ...]]:
    """The levels that a budget reaches: always the step that lowers its error most per byte.

    Args:
        curves: by layer, `KV levels`.
        costs: by layer, bytes of a slot.
        budget: bytes.
    """
    at = {(layer, head): 0 for layer, curve in curves.items() for head in range(len(curve))}
    steps: list[tuple[float, tuple[int, int], int]] = []

    def offer(key: tuple[int, int]) -> None:
        layer, head = key
        curve, now = curves[layer][head].tolist(), at[key]
        gains = [
            ((curve[now] - curve[to]) / (LEVELS[to] - LEVELS[now]) / costs[layer], to)
            for to in range(now + 1, len(curve))
        ]
        if gains and max(gains)[0] > 0:
            gain, to = max(gains)
            heapq.heappush(steps, (-gain, key, to))

    for key in at:
        offer(key)
    while steps:
        _, key, to = heapq.heappop(steps)
        price = (LEVELS[to] - LEVELS[at[key]]) * costs[key[0]]
        if price <= budget:
            budget -= price
            at[key] = to
            offer(key)
    return {
        layer: tuple(LEVELS[at[layer, head]] for head in range(len(curve)))
        for layer, curve in curves.items()
    }
