"""The texts of a repair in their roles: training text of one source; evaluation and validation text of another."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mismatch.errors import DataError
from mismatch.stages.opening import Opened
from mismatch.stages.repair.config import RepairConfig
from mismatch.texts.documents import Documents
from mismatch.texts.overlap import assert_apart
from mismatch.texts.windows import Windows


@dataclass(frozen=True)
class RepairTexts:
    """Windows by role, the documents that are trained and calibrated on, and those that are evaluated on."""

    evaluation: Windows
    validation: Windows
    train: Windows
    documents: Documents
    evaluated: Documents


def read_texts(opened: Opened[RepairConfig]) -> RepairTexts:
    """Training text of one source; of another, documents to evaluate on and other documents to validate on.

    Raises:
        DataError: text that is missing or too short, in both, or of one source.
    """
    config = opened.config
    if isinstance(data := opened.text_of("evaluation"), str) and data == opened.text_of("training"):
        raise DataError(
            f"`{data}` would be trained on and evaluated on",
            hint="evaluate on text of another source: --data and --train-data must differ",
        )
    training, held_out = opened.documents("training"), opened.documents("evaluation")
    _assert_apart(training, held_out)
    evaluation = opened.cut("evaluation", held_out, config.tokens)
    validation = opened.cut("validation", _without(held_out, evaluation), config.val_tokens)
    train = opened.cut("training", training, config.train_tokens - config.to_generate)
    assert_apart(train, evaluation, "which is evaluated on")
    assert_apart(train, validation, "which selects checkpoints")
    used = set(evaluation.names)
    evaluated = held_out.select((name in used for name in held_out.names), "evaluation")
    return RepairTexts(evaluation, validation, train, training, evaluated)


def _assert_apart(training: Documents, held_out: Documents) -> None:
    """Whether no document is in both, whatever its name.

    Raises:
        DataError: one is.
    """
    names = dict(zip(training.hashes, training.names, strict=True))
    shared = [
        (names[digest], name)
        for digest, name in zip(held_out.hashes, held_out.names, strict=True)
        if digest in names
    ]
    if shared:
        (theirs, ours), more = shared[0], len(shared) - 1
        raise DataError(
            f"the document {ours} of {held_out.source} is {theirs} of {training.source}: it would be trained on and "
            f"evaluated on{f', and {more} more' if more else ''}",
            hint="evaluate on text of another source: --data and --train-data must differ",
        )


def _without(documents: Documents, used: Windows) -> Documents:
    """The documents that no evaluation window comes from.

    Raises:
        DataError: there is none left.
    """
    left = [
        (name, text)
        for name, text in zip(documents.names, documents.texts, strict=True)
        if name not in used.names
    ]
    if not left:
        raise DataError(
            f"{documents.source}: all {len(documents)} documents are evaluated on, none is left for validation",
            hint="give more documents, or fewer --tokens",
        )
    names, texts = zip(*left, strict=True)
    return dataclasses.replace(documents, names=tuple(names), texts=tuple(texts))
