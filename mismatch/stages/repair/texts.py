"""The texts of a repair in their roles: training text of one source; evaluation and validation text of another."""

from __future__ import annotations

from dataclasses import dataclass

from mismatch.errors import UsageError
from mismatch.probes.inputs import plain_tokens
from mismatch.stages.opening import Opened
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.training_texts import training_texts
from mismatch.texts.documents import Documents
from mismatch.texts.retrieval import mixed, retrieval_windows, unable
from mismatch.texts.windows import Windows


@dataclass(frozen=True)
class RepairTexts:
    """Texts in their roles.

    Attributes:
        evaluation, validation, train: windows; retrieval-shaped ones are mixed into the last.
        documents: that are trained and calibrated on.
        evaluated: that are evaluated on.
        notes: on what is mixed in, or why nothing is.
    """

    evaluation: Windows
    validation: Windows
    train: Windows
    documents: Documents
    evaluated: Documents
    notes: tuple[str, ...] = ()


def read_texts(opened: Opened[RepairConfig]) -> RepairTexts:
    """Training text of one source; of another, documents to evaluate on and other documents to validate on.

    Raises:
        DataError: text that is missing or too short, in both, or of one source.
        UsageError: retrieval-shaped text was asked for, and cannot be made.
    """
    config = opened.config
    why_none = _no_retrieval_text(opened)
    to_make = 0 if why_none is not None else config.to_make
    found = training_texts(opened, config.train_tokens - config.to_generate - to_make)
    train, evaluation, held_out = found.train, found.evaluation, found.held_out
    used = set(evaluation.names)
    evaluated = held_out.select((name in used for name in held_out.names), "evaluation")
    notes = (why_none,) if why_none else ()
    if to_make:
        words = plain_tokens(opened.model_config.vocab_size, opened.tokenizer)
        made = retrieval_windows(train, opened.tokenizer, words, to_make, config.seed)
        train, notes = mixed(train, made), (_made(made),)
    return RepairTexts(evaluation, found.validation, train, found.training, evaluated, notes)


def _made(made: Windows) -> str:
    return (
        f"retrieval-shaped text is mixed into the training text: {made.tokens:,} tokens of needles, copies and lists, "
        f"fingerprint {made.fingerprint[:16]}"
    )


def _no_retrieval_text(opened: Opened[RepairConfig]) -> str | None:
    """Why no retrieval-shaped text is made: "" where none is wanted, else a sentence; None: it is made.

    Raises:
        UsageError: it was asked for, and cannot be made.
    """
    config = opened.config
    if not config.retrieval_share:
        return ""
    why = unable(opened.tokenizer, config.seq_len)
    if why is None and not config.to_make:
        share = f"{config.retrieval_share:g} of {config.train_tokens:,} training tokens"
        why = f"{share} is less than one window of {config.seq_len}"
    if why is not None and config.retrieval_text is not None:
        raise UsageError(
            f"--retrieval-text {config.retrieval_text:g} cannot be made: {why}",
            hint="take --retrieval-text 0, or longer windows and more training text",
        )
    return None if why is None else f"retrieval-shaped training text is left out: {why}"
