"""The ladder: each stage repairs what it can, is evaluated, and is kept only if it helped.

    scores -> slots -> inherit -> closed-form -> local -> block -> window -> end-to-end

A stage's weights are those that did best on validation windows; the evaluation windows are others, and are only run
between stages. When the KL on them, or retrieval, got worse (`mismatch.stages.repair.judge`), the weights from before
the stage come back. After each stage the weights are saved, so a run that was killed goes on at the last stage, and
inside it at the last saved step.

Several ranks hold the same student and go through the same stages. They share places or batches
(`ladder_stages.places`); what hangs on a clock or on a number that was read, the first rank decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mismatch.mechanisms.base import trains_new_first
from mismatch.models.layout import Layout
from mismatch.report.intervals import band
from mismatch.runs.plan import from_json
from mismatch.runs.ranks import ALONE, Ranks
from mismatch.runs.state import State
from mismatch.stages.repair.config import SWAPPED, RepairConfig
from mismatch.stages.repair.judge import Judge, Judged
from mismatch.stages.repair.ladder_stages.activation_store import Store
from mismatch.stages.repair.ladder_stages.block_window_kl import (
    EndToEndLoss,
    WindowLoss,
    block,
    final,
)
from mismatch.stages.repair.ladder_stages.budget import Pace, planned
from mismatch.stages.repair.ladder_stages.closed_form import closed_forms
from mismatch.stages.repair.ladder_stages.inherit import inherit, taking
from mismatch.stages.repair.ladder_stages.local import NEVER, LocalLoss, groups
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair, tensors_of
from mismatch.stages.repair.ladder_stages.places import Places
from mismatch.stages.repair.ladder_stages.scores import SCORES, asked, scores
from mismatch.stages.repair.ladder_stages.slot_counts import SLOTS, give, keepers, slots
from mismatch.stages.repair.ladder_stages.snapshot import bits, fingerprint, tensor
from mismatch.stages.repair.ladder_stages.stage_result import StageResult
from mismatch.stages.repair.ladder_stages.training import Group, Trained, Trainer
from mismatch.stages.repair.trainable import Trainable

LEAST_STEPS = 10  # a stage with time for fewer is left out
LATER_RATE = 0.25  # of all rates, in the stage `block`, where the modules were trained alone
LAST_RATE = 0.05  # in the stages behind it
NEIGHBOUR_RATE = 0.25  # of the rate of weights, for LoRA in the blocks behind, which starts anew


@dataclass
class Texts:
    """Batches of ids: of the training text, and of the validation text."""

    train: Sequence[Tensor]
    look: Sequence[Tensor]
    key: dict[str, str]


class Ladder:
    """Runs the stages.

    Args:
        config: the settings.
        teacher: layout of the untouched model.
        learner: the student, its parts and what else of it trains.
        judge: evaluates: text behind every reported number, and prompts of retrieval.
        texts: to train on, and to validate on.
        folder: for activations.
        state: where stages are saved; None never.
        fingerprint: of the run.
        stopping: True asks to save and stop.
        say: a line for the user.
        spent: seconds of the time there is that went by before.
        ranks: who works on it; each holds the student.
    """

    def __init__(
        self,
        config: RepairConfig,
        teacher: Layout,
        learner: Trainable,
        judge: Judge,
        texts: Texts,
        *,
        folder: Path,
        state: State | None,
        fingerprint: dict[str, Any],
        stopping: Callable[[], bool],
        say: Callable[[str], None],
        spent: float = 0.0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.config, self.teacher, self.student = config, teacher, learner.student
        self.learner, self.parts = learner, learner.parts
        self.companions, self.neighbours = learner.companions, learner.neighbours
        self.first = learner.student.plan.first or 0
        """The first block that is not the teacher's own."""
        self.judge, self.texts = judge, texts
        self.folder, self.state, self.fingerprint = folder, state, fingerprint
        self.stopping, self.say = stopping, say
        self.stages: list[StageResult] = []
        self.swapped: Judged
        """On the evaluation text, before the first stage; known behind `begin`."""
        self.best: Judged
        """After the stages that were kept."""
        longest = any(trains_new_first(part.student) or taking(part) for part in self.parts)
        self.pace = Pace(config, spent, longest)

    # ---- the run --------------------------------------------------------------------------------

    def begin(self) -> Judged:
        """What comes before the first stage: the teacher's activations, and the damage. Weights are those of the swap
        even where a run is resumed."""
        self._resume()
        self._run_teacher()
        self.swapped = self.best = self._evaluated()
        return self.swapped

    def run(self) -> list[StageResult]:
        """Every stage that was asked for, until they gain too little; behind `begin`.

        Raises:
            KeyboardInterrupt: stopped; everything is saved.
        """
        if not self.stages:
            self._report(StageResult(SWAPPED), self.swapped)
        else:
            self._load_weights()
            self.best = self._evaluated()
        done, ended = {stage.name for stage in self.stages}, False
        for name in (name for name in asked(self) if name not in done):
            if not ended and self.ranks.from_first(self._exhausted()):
                why = "no time is left, or two stages gained too little"
                self.say(f"the ladder ends before {name}: {why}")
                ended = True
            if ended and name != SLOTS:  # a budget is kept, whatever the time
                continue
            if any(self.ranks.everywhere(self.stopping())):
                raise KeyboardInterrupt
            before = self._weights()
            stage = getattr(self, "_" + name.replace("-", "_"))(name)
            self.ranks.copied(self.learner.named().values())
            now = self.best if name != SLOTS and self._still(before) else self._evaluated()
            why = self.ranks.from_first(now.worse_than(self.best))
            if why is not None and name != SLOTS:
                self._set(before)
                stage.kept = False
                stage.notes.append(f"{why}: undone")
            else:
                self.best = now
            self._report(stage, now)
            self._save()
        return self.stages

    def _exhausted(self) -> bool:
        if self.pace.left() <= 0:
            return True
        gains = [
            b.gap_closed - a.gap_closed for a, b in zip(self.stages, self.stages[1:], strict=False)
        ]
        tired = [gain < self.config.min_gain for gain in gains]
        return len(tired) >= 2 and all(tired[-2:])

    def _evaluated(self) -> Judged:
        with self.pace.uncounted():
            return self.judge.evaluate(self.student.layout)

    def _report(self, stage: StageResult, found: Judged) -> None:
        found.into(stage, self.swapped)
        self.stages.append(stage)
        self.say(
            f"{stage.name:12} KL {stage.kl:.4f} {band(stage.lo, stage.hi, '{:.4f}'.format)}  gap closed "
            f"{100 * stage.gap_closed:.1f} %  {stage.retrieval_words}  {stage.tokens} tokens  {stage.seconds:.0f} s"
            + ("" if stage.kept else "  (undone)")
        )

    # ---- the stages ------------------------------------------------------------------------------
    _scores, _slots, _inherit, _closed_form = scores, slots, inherit, closed_forms

    def _local(self, name: str) -> StageResult:
        places, fresh = Places.of(self, self.parts), self.learner.fresh()
        seconds = self.pace.share(name) / places.turns

        def train(stage: StageResult, at: int, part: ModulePair) -> None:
            store, held = self.stores([part], [part], ranks=places.together)
            learning = groups(part, fresh[part.path], self.config.lr, self.config.gate_lr)
            learning = [group for group in learning if group.joins < NEVER]
            loss = LocalLoss(part, store, held)
            self._train(stage, f"{name}-{at}", learning, loss, seconds)

        return places.run(StageResult(name), train, tensors_of)

    def _block(self, name: str) -> StageResult:
        """Each swapped block as a whole: what is left of the part's error, the rest of its block takes up."""
        places = Places.of(self, list(self.companions))
        seconds = self.pace.share(name) / places.turns

        def inside(layer: int) -> list[ModulePair]:
            return [part for part in self.parts if part.layer == layer]

        def train(stage: StageResult, _at: int, layer: int) -> None:
            whole = block(self.teacher, layer)
            store, held = self.stores(inside(layer), [whole], ranks=places.together)
            loss = WindowLoss(self.student.layout, store, held, whole, whole)
            learning = self._later(inside(layer), self.companions[layer], LATER_RATE)
            self._train(stage, f"{name}-{layer}", learning, loss, seconds)

        def changed(layer: int) -> list[Tensor]:
            parts = [tensor for part in inside(layer) for tensor in tensors_of(part)]
            return [*parts, *self.companions[layer].values()]

        return places.run(StageResult(name), train, changed)

    def _later(
        self, parts: Sequence[ModulePair], companions: dict[str, nn.Parameter], share: float
    ) -> list[Group]:
        """Modules that were trained alone, and what stands around them, all at once."""
        learning, fresh = [], self.learner.fresh()
        rates = (share * self.config.lr, share * self.config.gate_lr)
        for part in parts:
            learning += groups(part, fresh[part.path], *rates)
        for group in learning:
            group.joins = 0.0
        return [*learning, Group("block", companions, rates[0])]

    def _window(self, name: str) -> StageResult:
        entering, leaving = self._span()
        store, held = self.stores([], [entering, leaving])
        loss = WindowLoss(self.student.layout, store, held, entering, leaving)
        return self._through_blocks(name, loss)

    def _end_to_end(self, name: str) -> StageResult:
        entering, leaving = block(self.teacher, self.first), final(self.teacher)
        store, held = self.stores([], [entering, leaving])
        loss = EndToEndLoss(self.teacher, self.student.layout, store, held, entering, leaving)
        return self._through_blocks(name, loss)

    def _through_blocks(self, name: str, loss: Any) -> StageResult:
        stage = StageResult(name)
        around = {n: p for found in self.companions.values() for n, p in found.items()}
        learning = self._later(self.parts, around, LAST_RATE)
        learning.append(Group("neighbours", self.neighbours, NEIGHBOUR_RATE * self.config.lr))
        self._train(stage, name, learning, loss, self.pace.share(name))
        return stage

    def _train(
        self, stage: StageResult, key: str, learning: list[Group], loss: Any, seconds: float
    ) -> None:
        for group in learning:
            for parameter in group.parameters.values():
                parameter.requires_grad_(True)
        steps, looks = self._planned(key, loss, learning, seconds)
        if steps < LEAST_STEPS and seconds != float("inf"):
            stage.notes.append(f"left out: the time that is left allows {steps} steps")
            return
        deadline = time.monotonic() + seconds
        trainer = Trainer(
            learning,
            loss,
            loss.look,
            batches=self.texts.train,
            steps=steps,
            every=max(1, steps // looks),
            seed=self.config.seed,
            state=self._state_of(key, loss.ranks),
            fingerprint={**self.fingerprint, "stage": key, "steps": steps},
            ranks=loss.ranks,
            stopping=self.stopping,
            out_of_time=lambda: time.monotonic() > deadline + 0.2 * seconds,
            say=self.say,
        )
        done: Trained = trainer.run()
        for parameter in trainer.named.values():
            parameter.requires_grad_(False)
        stage.add([done])

    def _planned(
        self, key: str, loss: Any, learning: list[Group], seconds: float
    ) -> tuple[int, int]:
        """Steps and looks: as many as the epochs allow and as fit into the time; a resumed run keeps to the plan."""
        state = self._state_of(f"{key}-steps", loss.ranks)
        texts = self.texts.train
        return planned(loss, learning, texts, self.config, seconds, state, self.fingerprint)

    def _state_of(self, key: str, ranks: Ranks) -> State | None:
        """Where the first of some ranks saves what it trains."""
        if self.state is None or not ranks.first:
            return None
        return State(self.state.folder / key)

    # ---- activations ----------------------------------------------------------------------------

    def _run_teacher(self) -> None:
        """Everything that the cheap stages need, in one pass; end-to-end needs the whole model and runs it itself."""
        modules = [] if self._in_turn() or self.config.stages == (SCORES,) else list(self.parts)
        if "block" in self.config.stages and not self._in_turn():
            modules += [block(self.teacher, layer) for layer in self.companions]
        if "window" in self.config.stages:
            known = {part.path for part in modules}
            modules += [part for part in self._span() if part.path not in known]
        if modules:
            tokens = sum(ids.numel() for ids in self.texts.train)
            self.say(f"the teacher runs over {tokens:,} training tokens, once")
            self.stores([], modules)

    def _in_turn(self) -> bool:
        """Whether the parts after the first one read the student's stream, which is not there yet."""
        return self.config.order == "sequential" and len(self.parts) > 1

    def _span(self) -> tuple[ModulePair, ModulePair]:
        """The blocks whose input and output the stage `window` matches."""
        last = min(self.parts[-1].layer + self.config.window_blocks, self.teacher.n_layers - 1)
        return block(self.teacher, self.first), block(self.teacher, last)

    def stores(
        self,
        own: Sequence[ModulePair],
        modules: Sequence[ModulePair],
        every: int = 1,
        ranks: Ranks | None = None,
    ) -> tuple[Store, Store]:
        """Activations of each `every`-th training batch and held-out; `own`: parts that read the student's, in turn;
        `ranks`: who shares them, all by default."""
        behind = self.parts.index(own[0]) > 0 if own else False
        inputs = self.student.layout if behind and self.config.order == "sequential" else None
        whose = "teacher" if inputs is None else fingerprint(self._weights())
        found = []
        for batches, kind in ((self.texts.train, "train"), (self.texts.look, "look")):
            store = Store(
                self.teacher,
                modules,
                batches,
                folder=self.folder,
                budget=self.config.activations_gb * 1e9,
                dtype=getattr(torch, self.config.activations_dtype),
                key={**self.texts.key, "text": kind, "inputs": whose},
                inputs=inputs,
                every=every if kind == "train" else 1,
                ranks=self.ranks if ranks is None else ranks,
            )
            if store.folder is not None and len(store.stored) < len(modules):
                self.say(
                    f"the activations of {len(modules)} modules need {store.needed / 1e9:.3g} GB and "
                    f"--activations-gb is {self.config.activations_gb:g}: "
                    f"{len(modules) - len(store.stored)} of them are computed anew each time"
                )
            store.fill()
            found.append(store)
        return found[0], found[1]

    # ---- weights --------------------------------------------------------------------------------

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.learner.named().items()}

    def _still(self, before: dict[str, Tensor]) -> bool:
        """Whether no weight has changed, as where a stage had no time: then nothing is evaluated again."""
        return all(torch.equal(own, before[name]) for name, own in self.learner.named().items())

    @torch.no_grad()
    def _set(self, weights: dict[str, Tensor]) -> None:
        for name, own in self.learner.named().items():
            own.copy_(weights[name])

    def _save(self) -> None:
        if self.state is None or not self.ranks.first:
            return
        arrays = {name: bits(own) for name, own in self._weights().items()}
        info = {"stages": [asdict(stage) for stage in self.stages], "seconds": self.pace.spent()}
        self.state.save(arrays, info, self.fingerprint)

    def _resume(self) -> None:
        state = self.state if self.ranks.first else None
        found = None if state is None else state.load(self.fingerprint)
        info = self.ranks.from_first(None if found is None else found[1])
        if info is None:
            return
        self._arrays = {} if found is None else found[0]
        self.stages = [from_json(StageResult, stage, None) for stage in info["stages"]]
        self.pace.earlier = info["seconds"]

    def _load_weights(self) -> None:
        for stage in self.stages:
            if stage.slots:
                counts = {int(layer): tuple(own) for layer, own in stage.slots.items()}
                give(self.student, keepers(self.parts), counts)
        named = self.learner.named()
        if self.ranks.first:
            self._set({n: tensor(a, named[n]) for n, a in self._arrays.items()})
        self.ranks.copied(named.values())
