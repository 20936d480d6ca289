"""Every error that mismatch raises on purpose, with its hint and its exit code.

    MismatchError                 1   something failed
    |-- UsageError                2   a flag, an argument or a combination of them is wrong
    |   |-- SpecError             2   the swap text is wrong; shows it with a caret
    |   |-- ConfigError           2   a config file or a mechanism's argument is wrong
    |   |-- ModelError            2   no such model, no weights in it, weights of a refused kind
    |   |-- LayoutError           2   the model's family is not known, or it lacks a slot
    |   |-- DataError             2   no such text, or text that cannot be used
    |   `-- OutputError           2   the run folder exists, or holds another run
    |-- SurgeryError              1   a module could not be replaced
    |-- FetchError                1   a download failed or has the wrong hash
    |-- RunError                  1   a run folder could not be written or read
    `-- NumericsError             4   NaN or infinity where numbers should be

The text of an error has these parts: what is wrong, where, what was given, what is allowed, and what to do next (the
hint).
"""

from __future__ import annotations


class MismatchError(Exception):
    """Base of all. `str(error)` is the whole text a person should see, hint included."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class UsageError(MismatchError):
    exit_code = 2


class SpecError(UsageError):
    """A wrong swap text. `at` is the 0-based column of the fault in `text`."""

    def __init__(
        self,
        message: str,
        *,
        text: str | None = None,
        at: int | None = None,
        hint: str | None = None,
    ) -> None:
        if text is not None and at is not None:
            message = f"{message}\n  {text}\n  {' ' * at}^"
        super().__init__(message, hint=hint)
        self.text = text
        self.at = at


class ConfigError(UsageError):
    """`argument` is the name of the argument that is wrong, where one is: surgery shows it with a caret."""

    def __init__(
        self, message: str, *, hint: str | None = None, argument: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.argument = argument


class ModelError(UsageError):
    pass


class LayoutError(UsageError):
    pass


class DataError(UsageError):
    pass


class OutputError(UsageError):
    pass


class SurgeryError(MismatchError):
    pass


class FetchError(MismatchError):
    pass


class RunError(MismatchError):
    pass


class NumericsError(MismatchError):
    exit_code = 4
