"""transformers' TrainingArguments from `name=value`, read by transformers' own parser: none is mirrored here."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments
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
    except (ValueError, ImportError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"`trainer`: {reason}", hint=f"see {PAGE}") from error
    for name in made.report_to:
        if name not in get_available_reporting_integrations():
            raise UsageError(
                f"`trainer`: report_to={name}, and {name} is not installed here",
                hint=f"pip install {name}, or leave report_to out: the curve is in the report of the run",
            )
    return made


def _check(name: str, has_value: bool, word: str) -> None:
    known = {field.name for field in fields(TrainingArguments) if field.init}
    if name in OWN:
        raise UsageError(
            f"`trainer` sets {name}, which the command sets itself", hint=f"give {OWN[name]}"
        )
    if name not in known:
        raise UsageError(
            f"`trainer`: transformers' TrainingArguments have no `{name}`",
            hint=did_you_mean(name, known),
        )
    if not has_value:
        raise UsageError(f"`trainer` must be name=value, got `{word}`", hint=f"write {name}=...")
