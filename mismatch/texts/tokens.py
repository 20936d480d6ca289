"""A document as token ids, and which of its predictions are of an answer.

A chat is written by the tokenizer's own template. An answer is what the assistant says, with what the template puts
behind it to end the turn: the part that the template marks as generated, or else what it adds behind its own opening
of an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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
            hint="leave out --answers-only, or give rows with messages (see --text-field)",
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
    found = tokenizer(
        text, add_special_tokens=False, verbose=False, return_offsets_mapping=tokenizer.is_fast
    )
    if "offset_mapping" not in found:
        raise DataError(
            "--answers-only needs a tokenizer that knows where its tokens stand in the text, and this one does not",
            hint="count all tokens: leave out --answers-only",
        )
    places = np.array(found["offset_mapping"], np.int64).reshape(-1, 2)
    answer = np.zeros(len(places), bool)
    marked = re.search(r"{%-?\s*generation", tokenizer.get_chat_template())
    for start, end in (_marked if marked else _behind_openings)(chat.messages, name, tokenizer):
        answer |= (places[:, 0] >= start) & (places[:, 1] <= end)
    return np.array(found["input_ids"], np.int64), answer


Spans = Iterable[tuple[int, int]]
"""Where answers begin and end in the text of a chat."""


def _marked(messages: tuple[dict[str, Any], ...], _name: str, tokenizer: Any) -> Spans:
    """What the template says that the assistant generates."""
    # Not `apply_chat_template`, whose mask goes on to the end of the chat where an answer ends in a space.
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        [list(messages)],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    spans: Spans = rendered[1][0]
    return spans


def _behind_openings(messages: tuple[dict[str, Any], ...], name: str, tokenizer: Any) -> Spans:
    """What the template adds behind its own opening of an answer."""
    text = _written(messages, name, tokenizer)
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _written(messages[:at], name, tokenizer, opening=True)
            behind = _written(messages[: at + 1], name, tokenizer)
            if not (behind.startswith(before) and text.startswith(behind)):
                raise DataError(
                    f"{name}: where an answer begins cannot be told: the chat template writes its "
                    "beginning otherwise once more follows",
                    hint="count all tokens: leave out --answers-only; or give the tokenizer a template that marks "
                    "answers with {% generation %}",
                )
            yield len(before), len(behind)
