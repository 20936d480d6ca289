"""How far a swapped model drifts from its teacher while somebody trains it: a callback for transformers' Trainer.

    trainer = transformers.Trainer(model=student.model, ...)
    text = mismatch.windows(mismatch.read_documents("wiki"), teacher.tokenizer, 512, 8192)
    trainer.add_callback(mismatch.DriftCallback(trainer, teacher, text, every=100))

Before the first step, every so many steps and at the end both models read one fixed text that is not trained on, and
the Trainer's logs get

    drift/kl                  KL(teacher || student), mean over tokens, nats
    drift/nll                 NLL(student) - NLL(teacher) of the next token, nats
    drift/rel_l2_layer_07     ||student - teacher|| / ||teacher|| of the stream leaving a block, mean over tokens

TensorBoard, wandb and trackio show them as they show the loss. Training does not notice: the modes of the modules, the
gradients and the random state are as before, and several processes share the windows. A student equal to its teacher
reads 0.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mismatch.errors import DataError, UsageError
from mismatch.forward.head import CHUNK
from mismatch.forward.hooks import tapping
from mismatch.forward.measured import measured
from mismatch.forward.sites import leaving
from mismatch.metrics.sums.logits import kl_float64
from mismatch.models.layout import Layout
from mismatch.surgery.elsewhere import check_shape
from mismatch.surgery.operate import layout_of
from mismatch.surgery.students import Teacher
from mismatch.texts.windows import Windows

KL, NLL, LAYER = "drift/kl", "drift/nll", "drift/rel_l2_layer_"


class DriftCallback(TrainerCallback):
    """Logs how far the model in training is from its teacher, on one text.

    Args:
        trainer: whose model is watched and whose logs are written.
        teacher: from `mismatch.load`; on the device that the Trainer trains on.
        text: from `mismatch.windows`, cut by the teacher's tokenizer; none of it may be trained on.
        every: steps between two looks.
        batch_size: windows per forward pass.

    Raises:
        ModelError: the model has another shape or vocabulary than the teacher.
        UsageError: something else was given, or `every` or `batch_size` below 1.
        DataError: no window.
    """

    def __init__(
        self,
        trainer: Trainer,
        teacher: Teacher,
        text: Windows,
        *,
        every: int = 100,
        batch_size: int = 4,
    ) -> None:
        for given, kind, what in (
            (trainer, Trainer, "a transformers.Trainer"),
            (teacher, Teacher, "a teacher from mismatch.load"),
            (text, Windows, "windows from mismatch.windows"),
        ):
            if not isinstance(given, kind):
                raise UsageError(f"DriftCallback takes {what}, got {type(given).__name__}")
        for name, value in (("every", every), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"`{name}` must be int >= 1, got {value!r}")
        if not len(text):
            raise DataError("there is no window to read the drift on", hint="give more text")
        self.trainer, self.teacher, self.every = trainer, teacher, every
        self.student = layout_of(cast(Any, trainer.model))
        check_shape(teacher.layout, self.student, "in training")
        self.batches = [torch.from_numpy(part.ids) for part in text.batches(batch_size)]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == 0:  # else it is resumed, in the middle of its course
            self._look(state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # The last one before anything is saved, and before the best checkpoint takes the place of the model.
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self._look(state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._look(state, control)

    def _look(self, state: TrainerState, control: TrainerControl) -> None:
        """Log the readings, once a step."""
        step = state.global_step
        if any(KL in entry and entry["step"] == step for entry in state.log_history):
            return
        due = control.should_log
        self.trainer.log(self.readings())
        control.should_log = (
            due  # logging takes it back, and the loss of this step would not be logged
        )

    @torch.no_grad()
    def readings(self) -> dict[str, float]:
        """The numbers at this moment, by their names in the logs."""
        student, teacher = self.student, self.teacher.layout
        accelerator = self.trainer.accelerator
        count, rank = accelerator.num_processes, accelerator.process_index
        sums = torch.zeros(4 + teacher.n_layers, dtype=torch.float64)
        device = student.embedding_device
        with (
            measured(student.model, teacher.model),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            accelerator.autocast(),
        ):
            for start in range(0, len(self.batches), count):
                # Where models are sharded all ranks run equally often; what one has too many does not count.
                at = min(start + rank, len(self.batches) - 1)
                found = _compared(teacher, student, self.batches[at])
                sums += found if at == start + rank else 0 * found
        if count > 1:
            sums = accelerator.reduce(sums.to(accelerator.device), "sum")
        tokens, targets, kl, nll, *shifts = sums.tolist()
        return {
            KL: kl / tokens,
            NLL: nll / targets,
            **{f"{LAYER}{layer:02d}": shift / tokens for layer, shift in enumerate(shifts)},
        }


def _compared(teacher: Layout, student: Layout, ids: Tensor) -> Tensor:
    """Sums over one batch, on the CPU: tokens, tokens with a next one, KL, NLL difference, the shift of each layer."""
    theirs, reference = _run(teacher, ids)
    ours, logits = _run(student, ids)
    kl = nll = torch.zeros((), dtype=torch.float64, device=reference.device)
    targets = ids.roll(-1, 1).flatten().to(reference.device)
    follows = torch.ones_like(ids, dtype=torch.float64)
    follows[:, -1] = 0
    parts = (
        reference,
        logits.to(reference.device),
        targets,
        follows.flatten().to(reference.device),
    )
    for p, q, target, counts in zip(*(part.split(CHUNK) for part in parts), strict=True):
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        kl = kl + kl_float64(p, q).sum()
        nll = nll + (counts * (p - q).gather(1, target[:, None])[:, 0]).sum()
    shifts = [_relative(theirs[layer], ours[layer].to(theirs[layer].device)) for layer in theirs]
    sizes = torch.tensor([ids.numel(), follows.sum()], dtype=torch.float64)
    return torch.cat([sizes, torch.stack([one.double().cpu() for one in (kl, nll, *shifts)])])


def _run(layout: Layout, ids: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """The stream leaving each block, `batch pos d_model`, and the logits, `tokens vocab`, of the whole model: one that
    is sharded cannot be run in parts."""
    streams: dict[int, Tensor] = {}
    wanted = [leaving(layer) for layer in range(layout.n_layers)]
    with tapping(layout, wanted, lambda tap, value: streams.__setitem__(tap.layer, value)):
        found = layout.model(input_ids=ids.to(layout.embedding_device), use_cache=False)
    return streams, found.logits.flatten(0, 1)


def _relative(reference: Tensor, value: Tensor) -> Tensor:
    """The sum over tokens of the distance in lengths of the reference; 0 where nothing differs."""
    distance = (value.float() - reference.float()).norm(dim=-1)
    return torch.where(distance == 0, 0.0, distance / reference.float().norm(dim=-1)).sum()
