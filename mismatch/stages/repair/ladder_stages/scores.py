"""The stage `scores`: nets that choose which far tokens a mechanism keeps learn what the teacher attends to from afar.

A choice has no gradient, so no later stage can train it. Target of a token and kv head: the most attention that any
later query far from it gives it under the teacher's own attention (`parts/far_attention.py`), from the mechanism's
queries and keys before anything is trained. The net reads what the attention is given, from the stored pass:

    BCE(sigmoid(net(x)), y),  AdamW, STEPS steps of TOKENS tokens drawn with a seed, linear decay of the rate

All parts learn from one pass of the teacher, whatever `order` is: a part's scores are of the teacher's stream, for
which its target holds. So several ranks share the nets. Weights that err more on validation text than those that were
there are not taken. A net costs about two CPU-seconds at d_model 576.

Where no part has learned scores there is no such stage.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mismatch.mechanisms.base import Scored, scored_in
from mismatch.runs.state import State
from mismatch.stages.repair.ladder_stages.activation_store import GB, Store
from mismatch.stages.repair.ladder_stages.inherit import INHERIT, taking
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair
from mismatch.stages.repair.ladder_stages.slot_counts import SLOTS
from mismatch.stages.repair.ladder_stages.snapshot import bits, tensor
from mismatch.stages.repair.ladder_stages.stage_result import StageResult

if TYPE_CHECKING:
    from mismatch.stages.repair.ladder import Ladder

SCORES = "scores"
STEPS, TOKENS = 400, 1024  # of a net; 13 thousand tokens of text are seen 30 times
RATE, DECAY = 2e-3, 0.01
ENOUGH = 16_384
"""Training tokens that a net learns from: windows spread evenly over the training text."""


@dataclass(frozen=True)
class Learner:
    """A net to train: in which part, and the mechanism that it chooses for."""

    part: ModulePair
    mechanism: Scored
    net: nn.Module
    name: str


@dataclass(frozen=True)
class Judged:
    """A net on text that it was not trained on.

    Attributes:
        before, after, constant: BCE in nats per token and kv head: before, after, and of one number per head that knows
            the mean of the training targets.
        found: share of the targets' sum that the tenth of the tokens with the highest scores holds, mean over kv
            heads; chance is 0.1. The order is what a choice is made by; BCE counts the level too.
        best: the same share of the tenth with the highest targets.
    """

    before: float
    after: float
    constant: float
    found: float
    best: float


def asked(ladder: Ladder) -> tuple[str, ...]:
    """The stages that were asked for and have something to do."""
    idle = {SLOTS} if ladder.config.state_bytes is None else set()
    if SCORES in ladder.config.stages and not list(_learners(ladder.parts)):
        ladder.say(f"no part has learned scores: there is no stage `{SCORES}`")
        idle.add(SCORES)
    if INHERIT in ladder.config.stages and not any(taking(part) for part in ladder.parts):
        ladder.say(f"no part takes initial values: there is no stage `{INHERIT}`")
        idle.add(INHERIT)
    return tuple(name for name in ladder.config.stages if name not in idle)


def scores(ladder: Ladder, name: str) -> StageResult:
    """Train every net of the ladder's parts.

    Raises:
        KeyboardInterrupt: stopped; the nets that are done are saved.
    """
    stage, started = StageResult(name), time.monotonic()
    learners = list(_learners(ladder.parts))
    parts = list(dict.fromkeys(learner.part for learner in learners))
    store, held = ladder.stores([], parts, every=_every(ladder, len(parts)))

    def train(index: int) -> str | None:
        if ladder.stopping():
            raise KeyboardInterrupt
        if ladder.pace.left() <= 0:
            return None
        state = None if ladder.state is None else State(ladder.state.folder / f"{name}-{index}")
        key = {**ladder.fingerprint, "stage": f"{name}-{index}"}
        return _once(learners[index], store, held, ladder.config.seed + index, state, key)

    found = ladder.ranks.shared(range(len(learners)), train)
    for index, learner in enumerate(learners):
        ladder.ranks.copied(learner.net.state_dict().values(), source=index % ladder.ranks.world)
    stage.notes += (trained := [note for note in found if note is not None])
    stage.steps = STEPS * len(trained)
    if len(trained) < len(found):
        stage.notes.append(f"no time was left for {len(found) - len(trained)} of {len(found)}")
    stage.tokens = sum(store.batches[index].numel() for index in store.chosen)
    stage.seconds = time.monotonic() - started
    return stage


def _learners(parts: Iterable[ModulePair]) -> Iterator[Learner]:
    for part in parts:
        found = scored_in(part.student)
        for number, (mechanism, net) in enumerate(found):
            yield Learner(
                part, mechanism, net, part.where + (f" {number}" if len(found) > 1 else "")
            )


def _every(ladder: Ladder, parts: int) -> int:
    """Each how many-th batch is enough, or fits on the disk that activations may take."""
    batches = ladder.texts.train
    tokens = sum(ids.numel() for ids in batches)
    dtype = getattr(torch, ladder.config.activations_dtype)
    token = 2 * ladder.teacher.d_model * dtype.itemsize * parts
    most = max(1, min(ENOUGH, int(ladder.config.activations_gb * GB / token)))
    return min(len(batches), -(-tokens // most))


def _once(
    learner: Learner, store: Store, held: Store, seed: int, state: State | None, key: dict[str, Any]
) -> str:
    """Train a net, or take what an earlier process trained; what came of it in words."""
    net = learner.net
    found = None if state is None else state.load(key)
    if found is not None:
        arrays, info = found
        _write(net, {n: tensor(arrays[n], like) for n, like in net.state_dict().items()})
        return info["note"]
    started = time.monotonic()
    x, y = examples(learner, store)
    if not len(x):
        return f"{learner.name}: no token of a training window is far from a later query; --seq-len is too short"
    judged = _trained(net, x, y, *examples(learner, held), seed)
    note = (
        f"{learner.name}: BCE of the scores {judged.before:.4f} -> {judged.after:.4f} on validation text, a constant "
        f"has {judged.constant:.4f}; the tenth that scores highest holds {judged.found:.2f} of the far attention (best "
        f"{judged.best:.2f}, chance 0.10); {len(x):,} tokens, {time.monotonic() - started:.1f} s"
        + ("" if judged.after < judged.before else ": not taken")
    )
    if state is not None:
        state.save({n: bits(t) for n, t in net.state_dict().items()}, {"note": note}, key)
    return note


@torch.no_grad()
def examples(learner: Learner, store: Store) -> tuple[Tensor, Tensor]:
    """Inputs `tokens d_model` and targets `tokens KV` of a net, of tokens that some later query is far from."""
    inputs, targets = [], []
    for example in store.batches_of(learner.part):
        y = example.call(learner.mechanism.score_targets, example.x)
        known = ~y.isnan().any(-1)
        inputs.append(example.x[known])
        targets.append(y[known].clamp(0, 1))
    return torch.cat(inputs), torch.cat(targets)


def _trained(
    net: nn.Module, x: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor, seed: int
) -> Judged:
    """Train a float32 copy, and take its weights if they err less on validation text."""
    copied = copy.deepcopy(net).float().requires_grad_(True)
    optimiser = torch.optim.AdamW(copied.parameters(), lr=RATE, weight_decay=DECAY)
    draws = torch.Generator().manual_seed(seed)
    before = _error(copied, held_x, held_y)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        at = torch.randint(len(x), (TOKENS,), generator=draws).to(x.device)
        loss = F.binary_cross_entropy_with_logits(copied(x[at]), y[at].to(x.dtype))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        found, best = tenth(copied(held_x), held_y), tenth(held_y, held_y)
    after = _error(copied, held_x, held_y)
    judged = Judged(before, after, _constant(y, held_y), found, best)
    if judged.after < judged.before:
        _write(net, copied.state_dict())
    return judged


def tenth(ranks: Tensor, y: Tensor) -> float:
    """Share of the sum of y that the tenth of the tokens with the highest ranks holds, mean over heads; both `tokens
    KV`."""
    top = ranks.topk(max(1, len(y) // 10), dim=0).indices
    return float((y.gather(0, top).sum(0) / y.sum(0)).mean())


@torch.no_grad()
def _error(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(F.binary_cross_entropy_with_logits(net(x), y.to(x.dtype)))


def _constant(y: Tensor, held_y: Tensor) -> float:
    mean = y.mean(0).clamp(1e-6, 1 - 1e-6)
    return float(F.binary_cross_entropy(mean.expand_as(held_y), held_y))


@torch.no_grad()
def _write(net: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, own in net.state_dict(keep_vars=True).items():
        own.copy_(weights[name])
