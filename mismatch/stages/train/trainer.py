"""transformers' Trainer with the loss of a distillation, and what the command adds to it by callbacks.

    loss = kl_weight KL(teacher || student) + ce_weight CE(next token),        mean over the tokens of a batch, nats

Batches, schedule, mixed precision, gradient accumulation, checkpoints, DDP and FSDP2 are those of transformers and
accelerate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mismatch.errors import NumericsError, RunError
from mismatch.forward.head import CHUNK
from mismatch.texts.windows import Windows


class Rows(Dataset[dict[str, Tensor]]):
    """Windows as a data set of the Trainer."""

    def __init__(self, windows: Windows) -> None:
        self.ids = torch.from_numpy(windows.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}


class Collator:
    """Rows to a batch. The Trainer writes its `tokenizer` into each checkpoint."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids}


class DistillationTrainer(Trainer):
    """A Trainer whose loss is that of the module docstring.

    Args:
        teacher: the untouched model, in eval mode; not wrapped, so each process holds it whole.
        kl_weight, ce_weight: of the two parts; of a part that weighs 0 nothing is run.
        options: as of `transformers.Trainer`.
    """

    loss_is_scaled_for_ga = False  # a mean over one batch; all batches have as many tokens

    def __init__(
        self, *, teacher: nn.Module, kl_weight: float, ce_weight: float, **options: Any
    ) -> None:
        super().__init__(**options)
        self.teacher, self.kl_weight, self.ce_weight = teacher, kl_weight, ce_weight

    def learns(self) -> bool:
        """Whether any weight has a gradient: those of a control that deletes a module have none."""
        ids = self.train_dataset[0]["input_ids"][None, :2].to(self.args.device)  # type: ignore[index]
        return bool(cast(Any, self.model)(input_ids=ids, use_cache=False).logits.requires_grad)

    # What a checkpoint of the Trainer is read back by.
    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        with _reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        ids = inputs["input_ids"]
        outputs = model(input_ids=ids, use_cache=False)
        loss = torch.zeros((), device=outputs.logits.device)
        if self.kl_weight:
            with torch.no_grad(), self.accelerator.autocast():
                reference = self.teacher(input_ids=ids, use_cache=False).logits
            loss = loss + self.kl_weight * mean_kl(reference, outputs.logits)
        if self.ce_weight:
            logits = outputs.logits[:, :-1].flatten(0, 1).float()
            loss = loss + self.ce_weight * nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


def mean_kl(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(teacher || student), mean over tokens, nats: a scalar with a gradient to the student's logits.

    Float32 probabilities of a chunk of tokens live at a time; they are made once more on the way back.

    Args:
        reference, logits: `batch pos vocab`, of teacher and student.
    """
    total = torch.zeros((), device=logits.device)
    chunks = (whole.flatten(0, 1).split(CHUNK) for whole in (reference, logits))
    for theirs, ours in zip(*chunks, strict=True):
        total = total + checkpoint(_kl, theirs, ours, use_reentrant=False, preserve_rng_state=False)
    return total / logits[..., 0].numel()


def _kl(reference: Tensor, logits: Tensor) -> Tensor:
    p, q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return nn.functional.kl_div(q, p, reduction="sum", log_target=True)


class Course(TrainerCallback):
    """Tells of the training, ends it where it is asked to, and refuses a loss that is no number.

    Args:
        stopping: True saves and stops behind the step in flight.
        advance: told of each step.
    """

    def __init__(self, stopping: Callable[[], bool], advance: Callable[[int], Any]) -> None:
        self.stopping, self.advance = stopping, advance

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.advance(1)
        if self.stopping():
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        for name, value in (logs or {}).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise NumericsError(
                    f"{name} is {value} after step {state.global_step} of the training",
                    hint="begin anew with a lower learning_rate, a longer warmup_steps, or max_grad_norm; --student "
                    f"takes a checkpoint of {args.output_dir}, too",
                )


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint of a Trainer that is whole, whatever the process died of; None: there is none."""
    found = {
        int(number): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.rpartition("-")[2]).isdigit() and _whole(path)
    }
    return str(found[max(found)]) if found else None


def _whole(path: Path) -> bool:
    """Whether its last file can be read, and is of this step."""
    try:
        state = TrainerState.load_from_json(str(path / "trainer_state.json"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
    return state.global_step == int(path.name.rpartition("-")[2])


@contextmanager
def _reading(path: str | None) -> Iterator[None]:
    """Whatever a damaged file makes transformers and torch raise, in words.

    Raises:
        RunError: it cannot be read.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RunError(
            f"the training cannot go on from {path}: {reason:.200}",
            hint="delete that folder: --resume takes the checkpoint before it, or begins anew where there is none",
        ) from error
