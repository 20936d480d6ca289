"""The texts of a stage that trains, in their roles: training text of one source; evaluation and validation text of
another, of documents apart.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mismatch.errors import DataError
from mismatch.stages.opening import Opened
from mismatch.texts.documents import Documents
from mismatch.texts.overlap import assert_apart
from mismatch.texts.windows import Windows


@dataclass(frozen=True)
class TrainingTexts:
    """Texts in their roles.

    Attributes:
        training, held_out: documents of either source.
        train, evaluation, validation: windows.
    """

    training: Documents
    held_out: Documents
    train: Windows
    evaluation: Windows
    validation: Windows


def training_texts(opened: Opened[Any], train_tokens: int) -> TrainingTexts:
    """Training text of one source; of another, documents to evaluate on and other documents to validate on.

    Args:
        opened: its settings say how many `tokens` are evaluated on, and how many `val_tokens` validated on.
        train_tokens: to train on.

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
    train = opened.cut("training", training, train_tokens)
    assert_apart(train, evaluation, "which is evaluated on")
    assert_apart(train, validation, "which selects checkpoints")
    return TrainingTexts(training, held_out, train, evaluation, validation)


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
