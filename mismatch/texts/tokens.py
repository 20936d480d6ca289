"""A document as token ids, and which of its predictions are of an answer.

A chat is written by the tokenizer's own template. An answer is what the assistant says, with what the template puts
behind it to end the turn: the part that the template marks as generated, or else what it adds behind its own opening
of an answer.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from jinja2 import TemplateError

from mismatch.errors import DataError
from mismatch.texts.contents import Chat, Content, TokenIds


def encode(
    content: Content, name: str, tokenizer: Any, *, answers: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids without the tokenizer's prefix.

    Args:
        content: of the document.
        name: of the document, for errors.
        tokenizer: a transformers tokenizer.
        answers: also say which predictions are of an answer.

    Returns:
        ids `n`, and bool `n` with `answers`: the token behind this one is part of an answer.

    Raises:
        DataError: ids that the tokenizer does not have; a chat that it cannot write; answers asked of what is no chat.
    """
    if answers and not isinstance(content, Chat):
        raise DataError(
            f"{name} is no chat, so it holds no answers to score",
            hint="score all tokens: --score all; or give rows with messages (see --text-field)",
        )
    if isinstance(content, TokenIds):
        return _known(content.ids, name, tokenizer), None
    if isinstance(content, str):
        return _ids(content, tokenizer), None
    if not answers:
        return _ids(_written(content.messages, name, tokenizer), tokenizer), None
    ids, answer = _answered(content, name, tokenizer)
    return ids, np.append(answer[1:], False)


def _ids(text: str, tokenizer: Any) -> np.ndarray:
    found = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return np.array(found, dtype=np.int64)


def _known(ids: np.ndarray, name: str, tokenizer: Any) -> np.ndarray:
    if len(ids) and int(ids.max()) >= len(tokenizer):
        raise DataError(
            f"{name} holds the token id {ids.max()}, and the tokenizer has {len(tokenizer)} tokens",
            hint="token ids must be made by the tokenizer of --model",
        )
    return ids


def _written(
    messages: tuple[dict[str, Any], ...], name: str, tokenizer: Any, *, opening: bool = False
) -> str:
    """A chat as the template writes it; with `opening` of an answer behind it."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            f"{name} is a chat, and the model's tokenizer has no chat template",
            hint="take a chat model, or --text-field with a column of plain text",
        ) from error
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=opening,
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise DataError(f"{name}: the chat template refuses these messages: {error}") from error
    return text


def _answered(chat: Chat, name: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and bool: part of an answer."""
    text = _written(chat.messages, name, tokenizer)
    if re.search(r"{%-?\s*generation", tokenizer.get_chat_template()):
        found = tokenizer.apply_chat_template(
            list(chat.messages), return_dict=True, return_assistant_tokens_mask=True
        )
        return np.array(found["input_ids"], np.int64), np.array(found["assistant_masks"], bool)
    found = tokenizer(
        text, add_special_tokens=False, verbose=False, return_offsets_mapping=tokenizer.is_fast
    )
    if "offset_mapping" not in found:
        raise DataError(
            "--score answers needs a tokenizer that knows where its tokens stand in the text, and "
            "this one does not",
            hint="score all tokens: --score all",
        )
    spans = np.array(found["offset_mapping"], np.int64).reshape(-1, 2)
    answer = np.zeros(len(spans), bool)
    for at, message in enumerate(chat.messages):
        if message["role"] == "assistant":
            before = _written(chat.messages[:at], name, tokenizer, opening=True)
            behind = _written(chat.messages[: at + 1], name, tokenizer)
            if not (behind.startswith(before) and text.startswith(behind)):
                raise DataError(
                    f"{name}: where an answer begins cannot be told: the chat template writes its "
                    "beginning otherwise once more follows",
                    hint="score all tokens: --score all; or give a template that marks answers "
                    "with {% generation %}",
                )
            answer |= (spans[:, 0] >= len(before)) & (spans[:, 1] <= len(behind))
    return np.array(found["input_ids"], np.int64), answer
