"""The one training loop of every stage that takes gradient steps: groups, schedule, plateau, stop, resume.

What a stage adds is a loss over one batch. Everything else is decided here, once:

    order      batches in a seeded shuffle per epoch; step s takes the same batch in every run, so that a run that was
               killed and resumed ends at the same weights as one that was not
    schedule   linear warm-up, then cosine to zero, of every group's own rate; a group may join later
    masters    weights in a half type are trained through float32 copies: small updates are not rounded away
    gates      a group of their own: higher rate, no weight decay. A gate moves by about the sum of its rates, and at
               the usual rate it never leaves where it began
    plateau    the weights that did best on held-out windows are kept; no progress for `patience` looks ends the stage
    failures   a loss that is not finite ends the stage at the last good weights and names the step; out of memory
               halves the batch and goes on
    ranks      share the rows of each batch: losses and gradients are added before the step, which all of them take.
               What one of them meets (out of memory, asked to stop, out of time) all of them do
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mismatch.runs.batch_size import is_memory, no_room
from mismatch.runs.ranks import ALONE, Ranks
from mismatch.runs.state import State
from mismatch.stages.repair.ladder_stages.stage_result import Look

WARMUP = 0.05  # share of the steps
BETAS = (0.9, 0.95)
CLIP = 1.0  # norm of the whole gradient
CHEAPER = "leave out the dearest --stages"
MOVED = 0.05  # a gate that moved less has not moved
DRAWN = 64  # numbers of a gate's tensor, at most, of a trajectory: one a head can be drawn, one a channel cannot


@dataclass
class Group:
    """Parameters that train alike.

    Attributes:
        name: in reports.
        parameters: by name.
        lr: the highest rate.
        joins: share of the steps before which they stay as they are.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    lr: float
    joins: float = 0.0


@dataclass
class Trained:
    """What a loop did.

    Attributes:
        steps, tokens, seconds: spent, a resumed run's earlier ones included.
        looks: the held-out error over time.
        best: the look whose weights are kept.
        notes: what went wrong silently, or nearly, in words.
        gates: start and end of every gate group's tensors, by name.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    looks: list[Look] = field(default_factory=list)
    best: Look | None = None
    notes: list[str] = field(default_factory=list)
    gates: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    complete: bool = True


class Trainer:
    """One stage's loop.

    Args:
        groups: what trains.
        loss: of a batch (its number) and at most so many of its rows, this rank's part of it: a scalar with a
            gradient.
        look: the error on held-out windows, no gradient; the same on every rank.
        batches: of the training text, `batch pos` each.
        steps: at most.
        every: steps between looks.
        patience: looks without progress that end the stage.
        seed: of the order.
        state: where to save; None never saves. The first rank's is used.
        fingerprint: what must be equal for a resumed run to go on.
        stopping: asked after each step: True saves and stops.
        out_of_time: asked after each step: True ends the stage.
        say: a line for the user.
        save_every: seconds between saves.
        ranks: who shares each batch.
        advance: told how many tokens each step took.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        loss: Callable[[int, int], Tensor],
        look: Callable[[], float],
        *,
        batches: Sequence[Tensor],
        steps: int,
        every: int,
        patience: int = 4,
        seed: int = 0,
        state: State | None = None,
        fingerprint: dict[str, Any] | None = None,
        stopping: Callable[[], bool] = lambda: False,
        out_of_time: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = lambda _line: None,
        save_every: float = 60.0,
        ranks: Ranks = ALONE,
        advance: Callable[[int], None] = lambda _tokens: None,
    ) -> None:
        self.groups = [group for group in groups if group.parameters]
        self.loss, self.look = loss, look
        self.batches, self.rows = batches, max(len(batch) for batch in batches)
        self.steps, self.every, self.patience, self.seed = steps, every, patience, seed
        self.ranks = ranks
        self.state, self.fingerprint = state if ranks.first else None, fingerprint or {}
        self.stopping, self.out_of_time, self.say = stopping, out_of_time, say
        self.save_every, self.advance = save_every, advance
        self.named = {n: p for group in self.groups for n, p in group.parameters.items()}
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.named.items()
        }
        self.optimiser = torch.optim.AdamW(
            [
                {"params": [self.masters[n] for n in group.parameters], "lr": group.lr}
                for group in self.groups
            ],
            betas=BETAS,
            weight_decay=0.0,
        )
        self._asked = (False, False)  # behind each step: to stop, and whether time is out
        self.moved: set[str] = set()  # parameters that ever had a gradient
        self.kept: dict[str, Tensor] = {}
        self.start = {n: m.detach().clone() for n, m in self.masters.items()}

    def run(self) -> Trained:
        """Train; the weights end as those that did best on the held-out windows."""
        done = self._resumed() or self._began()
        saved = began = time.monotonic()
        spent = done.seconds
        while done.steps < self.steps and self._going_on(done):
            if not self._step(done):
                break
            done.seconds = spent + time.monotonic() - began
            if done.steps % self.every == 0 or done.steps == self.steps:
                self._look(done)
            if self.state is not None and time.monotonic() - saved > self.save_every:
                self._save(done)
                saved = time.monotonic()
            stop, late = self._asked
            if stop:
                done.complete = False
                self._save(done)
                raise KeyboardInterrupt
            if late:
                break
        if done.looks[-1].step != done.steps:
            self._look(done)
        self._restore()
        done.notes += self._silent()
        done.gates = self._gates()
        return done

    def _began(self) -> Trained:
        done = Trained()
        self._look(done)
        return done

    def _going_on(self, done: Trained) -> bool:
        recent = done.looks[-self.patience :]
        return len(done.looks) <= self.patience or done.best in recent

    def _step(self, done: Trained) -> bool:
        """One step; False when the loss is not finite."""
        index = self._batch(done.steps)
        self._rates(done.steps)
        while (loss := self._backward(index)) is None:
            if self.rows == 1:
                raise no_room(f"at step {done.steps}", CHEAPER)
            self._clear()
            self.rows = self.rows // 2
            done.notes.append(
                f"out of memory at step {done.steps}: {self.rows} windows a batch from here on"
            )
            self.say(done.notes[-1])
        if not math.isfinite(loss):
            done.notes.append(
                f"the loss of step {done.steps} is {loss}: stopped, the last good weights are kept"
            )
            self.say(done.notes[-1])
            self._clear()
            return False
        self.moved |= {
            name
            for name, master in self.masters.items()
            if name not in self.moved and master.grad is not None and bool(master.grad.any())
        }
        norm = torch.nn.utils.clip_grad_norm_(list(self.masters.values()), CLIP)
        if not torch.isfinite(norm):
            done.notes.append(
                f"the gradient of step {done.steps} is not finite: stopped, the last good weights are kept"
            )
            self.say(done.notes[-1])
            self._clear()
            return False
        self.optimiser.step()
        self._clear()
        self._publish()
        tokens = self.batches[index][: self.rows].numel()
        done.steps += 1
        done.tokens += tokens
        self.advance(tokens)
        return True

    def _backward(self, index: int) -> float | None:
        """The loss of a batch, and its gradient in the masters; None: out of memory, on whichever rank."""
        value, full = 0.0, False
        try:
            loss = self.loss(index, self.rows)
            value = loss.item()
            if math.isfinite(value):
                loss.backward()
        except (MemoryError, RuntimeError) as error:
            if not is_memory(error):
                raise
            full = True
        for name, parameter in self.named.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float()
        told = [value, float(full), float(self.stopping()), float(self.out_of_time())]
        value, some_full, stop, late = self._of_all(told)
        self._asked = bool(stop), bool(late)
        return None if some_full else value

    @torch.no_grad()
    def _of_all(self, told: list[float]) -> list[float]:
        """What each rank tells, added; the gradients too, in one message. A parameter without a gradient has 0."""
        if self.ranks.world == 1:
            return told
        masters = list(self.masters.values())
        found = [torch.zeros_like(m) if m.grad is None else m.grad for m in masters]
        device = masters[0].device
        flat = [part.to(device).flatten() for part in (*found, torch.tensor(told))]
        whole = self.ranks.added(torch.cat(flat)).split([len(part) for part in flat])
        for master, part in zip(masters, whole[:-1], strict=True):
            master.grad = part.view_as(master).to(master.device)
        return whole[-1].tolist()

    def _batch(self, step: int) -> int:
        """The batch of a step: a function of the step alone."""
        epoch, place = divmod(step, len(self.batches))
        return int(np.random.default_rng([self.seed, epoch]).permutation(len(self.batches))[place])

    def _rates(self, step: int) -> None:
        for group, settings in zip(self.groups, self.optimiser.param_groups, strict=True):
            first = round(group.joins * self.steps)
            share = (step - first) / max(1, self.steps - first)
            warm = min(1.0, (step - first + 1) / max(1.0, WARMUP * self.steps))
            on = step >= first
            settings["lr"] = group.lr * warm * 0.5 * (1 + math.cos(math.pi * share)) if on else 0.0

    def _look(self, done: Trained) -> None:
        error = self.look()
        gates = {
            name: self.masters[name].detach().flatten().tolist()
            for name in self._gate_names()
            if self.masters[name].numel() <= DRAWN
        }
        done.looks.append(Look(done.steps, done.tokens, done.seconds, error, gates))
        if math.isfinite(error) and (done.best is None or error < done.best.error):
            done.best = done.looks[-1]
            self.kept = {name: m.detach().clone() for name, m in self.masters.items()}

    @torch.no_grad()
    def _restore(self) -> None:
        for name, tensor in self.kept.items():
            self.masters[name].copy_(tensor)
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self.named.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def _clear(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        for parameter in self.named.values():
            parameter.grad = None

    def _silent(self) -> list[str]:
        """What would otherwise go unseen."""
        notes = []
        still = [name for name in self.named if name not in self.moved]
        if still:
            notes.append(f"no gradient reached {', '.join(still)}")
        rounded = [
            name
            for name, parameter in self.named.items()
            if self.masters[name] is not parameter
            and bool((self.masters[name] != self.start[name]).any())
            and torch.equal(parameter, self.start[name].to(parameter.dtype))
        ]
        if rounded:
            notes.append(f"the format rounds every change away in {', '.join(rounded)}")
        for name, (start, end) in self._gates().items():
            travel = max(abs(a - b) for a, b in zip(start, end, strict=True))
            if travel < MOVED:
                notes.append(f"{name} moved by {travel:.3f} at most in this stage")
        return notes

    def _gates(self) -> dict[str, tuple[list[float], list[float]]]:
        return {
            name: (self.start[name].flatten().tolist(), self.masters[name].flatten().tolist())
            for name in self._gate_names()
        }

    def _gate_names(self) -> list[str]:
        return [n for group in self.groups if group.name == "gates" for n in group.parameters]

    def _save(self, done: Trained) -> None:
        if self.state is None:
            return
        arrays: dict[str, np.ndarray] = {}
        for name, master in self.masters.items():
            arrays[f"now/{name}"] = master.detach().cpu().numpy()
            arrays[f"start/{name}"] = self.start[name].cpu().numpy()
            if name in self.kept:
                arrays[f"kept/{name}"] = self.kept[name].cpu().numpy()
            for key, value in self.optimiser.state.get(master, {}).items():
                arrays[f"adam/{key}/{name}"] = np.atleast_1d(value.detach().cpu().numpy())
        info = {
            "steps": done.steps,
            "tokens": done.tokens,
            "seconds": done.seconds,
            "looks": [vars(look) for look in done.looks],
            "best": None if done.best is None else done.looks.index(done.best),
            "notes": done.notes,
            "rows": self.rows,
            "moved": sorted(self.moved),
        }
        self.state.save(arrays, info, self.fingerprint)

    @torch.no_grad()
    def _resumed(self) -> Trained | None:
        found = None if self.state is None else self.state.load(self.fingerprint)
        found = self.ranks.from_first(found)
        if found is None:
            return None
        arrays, info = found
        for name, master in self.masters.items():
            master.copy_(torch.from_numpy(arrays[f"now/{name}"]))
            self.start[name] = torch.from_numpy(arrays[f"start/{name}"]).to(master.device)
            if f"kept/{name}" in arrays:
                self.kept[name] = torch.from_numpy(arrays[f"kept/{name}"]).to(master.device)
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"adam/{key}/{name}" in arrays:
                    value = torch.from_numpy(arrays[f"adam/{key}/{name}"].copy())
                    value = value.reshape(()) if key == "step" else value.to(master.device)
                    self.optimiser.state[master][key] = value
        self._publish()
        self.rows, self.moved = info["rows"], set(info["moved"])
        looks = [Look(**look) for look in info["looks"]]
        best = None if info["best"] is None else looks[info["best"]]
        return Trained(
            info["steps"], info["tokens"], info["seconds"], looks, best, list(info["notes"])
        )
