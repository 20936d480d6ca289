"""transformers' TrainingArguments from `name=value`, read by transformers' own parser: none is mirrored here."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn, cast

import torch
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations

from mismatch.errors import UsageError
from mismatch.registry import did_you_mean

OWN = {
    "output_dir": "--output",
    "seed": "--seed",
    "per_device_train_batch_size": "--batch-size",
    "per_device_eval_batch_size": "--batch-size",
    "resume_from_checkpoint": "--resume",
    "use_cpu": "--device",
}
"""What a flag of the command says."""

REFUSED = {
    "label_smoothing_factor": "the loss is that of --kl-weight and --ce-weight",
    "auto_find_batch_size": "give a smaller --batch-size: windows are cut for batches of that size",
    "push_to_hub": "upload RUN/checkpoint when it is done",
    "hub_token": "upload RUN/checkpoint when it is done; settings are written into the run folder",
}
"""What would do nothing here, or more than train; what to do in its place."""

PAGE = "https://huggingface.co/docs/transformers/main_classes/trainer"


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"`trainer`: {message}", hint=f"the settings are described in {PAGE}")


def training_arguments(words: Sequence[str], **given: Any) -> TrainingArguments:
    """The settings of the Trainer.

    Args:
        words: `name=value` each; a value of several words is a list where the setting is one.
        given: defaults of the command, in place of transformers' own.

    Raises:
        UsageError: no such setting, no value for it, one that a flag of the command has, or one that needs a package
            which is not installed.
    """
    parser = _Parser(TrainingArguments, allow_abbrev=False)  # type: ignore[arg-type]
    parser.set_defaults(**given)
    read = []
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        _check(name, bool(equals), word)
        [action] = [one for one in parser._actions if f"--{name}" in one.option_strings]
        several = action.nargs in ("*", "+")
        read += [f"--{name}", *value.split()] if several else [f"--{name}={value.strip()}"]
    try:
        # transformers prints to stdout what it thinks of some settings.
        with contextlib.redirect_stdout(None):
            [made] = parser.parse_args_into_dataclasses(read, look_for_args_file=False)
        DataLoader(
            [0],  # type: ignore[arg-type]  # a sequence will do
            num_workers=made.dataloader_num_workers,
            persistent_workers=made.dataloader_persistent_workers,
            prefetch_factor=made.dataloader_prefetch_factor,
        )
    except (ValueError, ImportError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"`trainer`: {reason}", hint=f"see {PAGE}") from error
    for name in made.report_to:
        if name not in get_available_reporting_integrations():
            raise UsageError(
                f"`trainer`: report_to={name}, and {name} is not installed here",
                hint=f"pip install {name}, or leave report_to out: the curve is in the report of the run",
            )
    _check_values(made)
    return made


def check_optimizer(made: TrainingArguments, model: Any) -> None:
    """Whether its optimizer and schedule can be made, tried on one number.

    Args:
        made: the settings.
        model: that will train; without weights will do.

    Raises:
        UsageError: they cannot.
    """
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(made, model)
        if options.keys() & {"params", "model", "optimizer_dict"}:
            return  # one that is made of the model itself
        optimizer = kind([torch.zeros(1, requires_grad=True)], **options)
        get_scheduler(
            made.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=cast(Any, made.lr_scheduler_kwargs),
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"`trainer`: {error}", hint=f"see {PAGE}") from error


def _check_values(made: TrainingArguments) -> None:
    if made.fp16 and made.use_cpu:
        raise UsageError(
            "`trainer`: fp16 is for a GPU, and this training runs on the CPU",
            hint="bf16=true runs there",
        )
    if made.gradient_accumulation_steps < 1:
        raise UsageError(
            f"`trainer`: gradient_accumulation_steps must be >= 1, got {made.gradient_accumulation_steps}"
        )
    epochs = made.num_train_epochs
    if made.max_steps == 0 or (made.max_steps < 0 and not 0 < epochs < math.inf):
        raise UsageError(
            f"`trainer`: max_steps={made.max_steps} and num_train_epochs={epochs} are no training",
            hint="give max_steps=1000, or num_train_epochs=1",
        )
    if made.load_best_model_at_end and made.metric_for_best_model not in ("loss", "eval_loss"):
        raise UsageError(
            f"`trainer`: metric_for_best_model={made.metric_for_best_model}, and validation text gives the loss alone",
            hint="leave it out: nothing that is reported may choose a checkpoint",
        )


def _check(name: str, has_value: bool, word: str) -> None:
    known = {field.name for field in fields(TrainingArguments) if field.init}
    if not name or not has_value:
        raise UsageError(
            f"`trainer` must be name=value, got `{word}`",
            hint=f"write {name or 'learning_rate'}=...",
        )
    if name in OWN:
        raise UsageError(
            f"`trainer` sets {name}, which the command sets itself", hint=f"give {OWN[name]}"
        )
    if name in REFUSED:
        raise UsageError(f"`trainer` sets {name}, which is not for here", hint=REFUSED[name])
    if name not in known:
        raise UsageError(
            f"`trainer`: transformers' TrainingArguments have no `{name}`",
            hint=did_you_mean(name, known),
        )
