"""The looks of a training: the drift from the teacher, and probes, every so many steps; and what is left of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from mismatch.runs.table import as_table
from mismatch.stages.opening import Opened
from mismatch.stages.probe.questions import answers
from mismatch.stages.probe.words import headlines, named
from mismatch.stages.train.config import TrainConfig
from mismatch.stages.train.drift import KL, LAYER, NLL, DriftCallback
from mismatch.stages.train.plan import Look
from mismatch.stages.train.trainer import DistillationTrainer
from mismatch.surgery.operate import Student
from mismatch.texts.windows import Windows

if TYPE_CHECKING:
    from mismatch.stages.train.stage import Prepared

PROBE = "probe/"


class Looks(DriftCallback):
    """A DriftCallback that asks the probes, too, and says what it read.

    Args:
        opened: with its teacher.
        trainer: whose model is watched.
        prepared: texts and probes.
        student: that trains.
    """

    def __init__(
        self,
        opened: Opened[TrainConfig],
        trainer: DistillationTrainer,
        prepared: Prepared,
        student: Student,
    ) -> None:
        config = opened.config
        super().__init__(
            trainer,
            opened.teacher,
            prepared.texts.evaluation,
            every=config.eval_every,
            batch_size=config.batch_size,
        )
        self.opened, self.asked, self.learner = opened, prepared.asked, student

    def readings(self) -> dict[str, float]:
        found = super().readings()
        if self.asked is None:
            return found
        answered = answers(self.asked, self.teacher, [self.learner])
        table = as_table([{**row, "run_id": ""} for row in answered.rows])
        return found | {
            f"{PROBE}{named(row)}": float(row.value)
            for row in headlines(table).itertuples()
            if row.applies
        }

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs and KL in logs:
            self.opened.say(
                f"step {state.global_step}: KL {logs[KL]:.4f}, NLL {logs[NLL]:+.4f} nats"
            )

    def of_run(self, train: Windows, kept: int) -> tuple[Look, ...]:
        """Every look of the Trainer's logs, those before it was resumed too, and one at the weights that are kept.

        Args:
            train: what was trained on.
            kept: the step of these weights, which the model has now.
        """
        trainer = self.trainer
        arguments = trainer.args
        step_rows = arguments.train_batch_size * arguments.world_size
        step_rows *= arguments.gradient_accumulation_steps
        each = -(-len(train) // step_rows)  # steps of an epoch, the last of which may be smaller

        def tokens(step: int) -> int:
            epochs, rest = divmod(step, each)
            return (epochs * len(train) + min(rest * step_rows, len(train))) * train.seq_len

        found = {int(log["step"]): log for log in trainer.state.log_history if KL in log}
        if kept not in found:
            found[kept] = self.readings()
        return tuple(
            Look(
                step=step,
                tokens=tokens(step),
                kl=found[step][KL],
                nll=found[step][NLL],
                shift=tuple(
                    found[step][name] for name in sorted(found[step]) if name.startswith(LAYER)
                ),
                probes={
                    name.removeprefix(PROBE): value
                    for name, value in found[step].items()
                    if name.startswith(PROBE)
                },
            )
            for step in sorted(found)
        )
