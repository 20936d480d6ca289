"""The same steps spent on a control: what training alone does, and what is recovered without the mechanism.

A control goes through the stages that the swap ran and kept, with the same number of steps, batches in the same
order and the same rates; closed forms are not for it. Two controls ask two questions:

    identity   the unswapped layer. Does distillation on this text alone move the model? In float32 it cannot: the
               student starts where every loss and its gradient are exactly 0, so it reads exactly 0. In a half
               type, or on activations stored in one, what it reads is drift
    zero       the module deleted. What do the rest of the block and LoRA behind it recover without the mechanism? A
               repaired swap that is no better was repaired around it

The weights evaluated are those of the last step. Nothing is chosen on held-out text, for a choice would return to the
start and hide a drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

from mismatch.forward.heldout import Evaluated
from mismatch.stages.repair.ladder import Ladder
from mismatch.stages.repair.ladder_stages.stage_result import StageResult
from mismatch.stages.repair.ladder_stages.training import Group, Trainer


class TrainedControl(Ladder):
    """A ladder of stages that were run already, on another student. `run_like` in place of `run`."""

    def run_like(self, stages: Sequence[StageResult]) -> Evaluated:
        """Train as long as each of these stages did, then evaluate.

        Raises:
            KeyboardInterrupt: stopped; this control starts anew when the run is resumed.
        """
        self._run_teacher()
        for stage in stages:
            if stage.kept and stage.steps:
                self._steps = stage.steps // self._loops(stage.name)
                getattr(self, "_" + stage.name.replace("-", "_"))(stage.name)
        return self.judge.evaluate(self.student.layout)

    def _loops(self, name: str) -> int:
        """How many loops share the steps of a stage."""
        return {"local": len(self.parts), "block": max(1, len(self.companions))}.get(name, 1)

    def _train(
        self, stage: StageResult, key: str, learning: list[Group], loss: Any, seconds: float
    ) -> None:
        for group in learning:
            for parameter in group.parameters.values():
                parameter.requires_grad_(True)
        # Of a mechanism that learns nothing the stage `local` has no gradient.
        if loss.ranks.from_first(loss(0, 1).requires_grad):
            later = count()
            trainer = Trainer(
                learning,
                loss,
                lambda: float(-next(later)),  # the last weights are the best ones
                batches=self.texts.train,
                steps=self._steps,
                every=self._steps,
                seed=self.config.seed,
                stopping=self.stopping,
                say=self.say,
                ranks=loss.ranks,
            )
            trainer.run()
        for group in learning:
            for parameter in group.parameters.values():
                parameter.requires_grad_(False)
