"""What time there is, how stages part it, and how many steps fit into a part."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from mismatch.runs.batch_size import is_memory, no_room
from mismatch.runs.state import State
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.ladder_stages.training import CHEAPER, Group

WEIGHTS = {"local": 15, "block": 51, "window": 30.6, "end-to-end": 3.4}
"""How stages that train part the time among those still to come; the closed form takes what it takes."""
LOCAL_LONGEST = 150
"""In place of the first of them where the layer alone has most to learn: new parameters that train alone at first
(`Mechanism.new_first`), a recurrent mixer. Little is left for the stages behind: a second of `local` is then worth more
than one of `block`."""
TRIAL_STEPS = 2  # timed to plan the others
LOOKS = 8  # per stage, fewer where a look is dear:
LOOKING = 0.2  # share of a stage's time that looks may take


class Pace:
    """The clock of one repair. Seconds of evaluation are not counted.

    Args:
        config: the settings; `max_minutes` None is no limit.
        spent: seconds that went by before the first stage and count.
        local_longest: whether the stage `local` gets most of the time.
    """

    def __init__(
        self, config: RepairConfig, spent: float = 0.0, local_longest: bool = False
    ) -> None:
        self.config = config
        self.weights = {**WEIGHTS, "local": LOCAL_LONGEST} if local_longest else WEIGHTS
        self.began = time.monotonic()
        self.earlier = spent  # of a resumed repair, what its process had spent
        self.idle = 0.0

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What runs inside is evaluation, not repair."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.idle += time.monotonic() - started

    def spent(self) -> float:
        """Seconds of repair, an earlier process's included."""
        return self.earlier + time.monotonic() - self.began - self.idle

    def left(self) -> float:
        """Seconds."""
        if self.config.max_minutes is None:
            return float("inf")
        return self.config.max_minutes * 60 - self.spent()

    def share(self, name: str) -> float:
        """Seconds that a stage may spend: its part of the time that is left, among the stages from it on."""
        coming = self.config.stages[self.config.stages.index(name) :]
        return self.left() * self.weights[name] / sum(self.weights[stage] for stage in coming)


def planned(
    loss: Any,
    learning: list[Group],
    batches: Sequence[Tensor],
    config: RepairConfig,
    seconds: float,
    state: State | None,
    fingerprint: Mapping[str, Any],
) -> tuple[int, int]:
    """Steps and looks: as many as the epochs allow and as fit into the time. Epochs are passes over the text that was
    asked for: where time allows a part of it only, that part is gone through more often, as long as the validation text
    gains. Of several ranks the first one's clock counts.

    Args:
        loss: of the stage.
        learning: what trains.
        batches: of the training text.
        config: how many epochs, of how much text.
        seconds: there are; without a limit nothing is timed.
        state: where the plan is kept, so that a resumed run keeps to it; None: it is not.
        fingerprint: of the run.
    """
    if seconds == math.inf:
        return config.epochs * len(batches), LOOKS
    asked = math.ceil(config.train_tokens / (config.seq_len * config.batch_size))
    most = config.epochs * max(asked, len(batches))
    kept = loss.ranks.from_first(None if state is None else state.load(fingerprint))
    if kept is not None:
        return kept[1]["steps"], kept[1]["looks"]
    steps, looks = loss.ranks.from_first(fitting(loss, learning, batches, most, seconds))
    if state is not None:
        state.save({}, {"steps": steps, "looks": looks}, fingerprint)
    return steps, looks


def fitting(
    loss: Any, learning: list[Group], batches: Sequence[Tensor], most: int, seconds: float
) -> tuple[int, int]:
    """Steps, so many at most, and looks that fit into some seconds: a look and a few steps are timed."""
    started = time.monotonic()
    loss.look()
    look = time.monotonic() - started
    each = _timed(loss, len(batches), len(batches[0]))
    for group in learning:
        for parameter in group.parameters.values():
            parameter.grad = None
    looks = min(LOOKS, max(1, int(LOOKING * seconds / look)))
    return max(0, min(most, int((seconds - (looks + 2) * look) / each))), looks


def _timed(loss: Callable[[int, int], Tensor], batches: int, rows: int) -> float:
    """Seconds of a step, with as many windows as there is memory for; the loop itself finds out how many."""
    try:
        # What is made on first use is not part of a step.
        loss(0, rows).backward()
        started = time.monotonic()
        for index in range(TRIAL_STEPS):
            loss(index % batches, rows).backward()
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        if rows == 1:
            raise no_room("while steps were timed", CHEAPER) from error
        return _timed(loss, batches, rows // 2)
    return (time.monotonic() - started) / TRIAL_STEPS
