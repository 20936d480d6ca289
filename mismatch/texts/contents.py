"""What a document holds: text, the messages of a chat, or token ids that were made elsewhere. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mismatch.errors import DataError

SPEAKERS = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of who speaks -> those of chat templates."""


@dataclass(frozen=True, eq=False)
class TokenIds:
    """ids: whole numbers `n`, of the tokenizer of the model that will read them."""

    ids: np.ndarray


@dataclass(frozen=True)
class Chat:
    """messages: as chat templates take them, `role` and `content` each."""

    messages: tuple[dict[str, Any], ...]


Content = str | Chat | TokenIds


def digest(content: Content) -> str:
    """sha256: equal for the same text, messages or ids, wherever they come from."""
    if isinstance(content, str):
        data = content.encode()
    elif isinstance(content, Chat):
        data = b"chat" + json.dumps(content.messages, sort_keys=True, default=str).encode()
    else:
        data = b"ids" + content.ids.astype("<i8").tobytes()
    return hashlib.sha256(data).hexdigest()


def size(content: Content) -> int:
    """Bytes that it takes in memory, about."""
    if isinstance(content, str):
        return len(content)
    if isinstance(content, Chat):
        return sum(len(str(message)) for message in content.messages)
    return content.ids.nbytes


def is_empty(content: Content) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return not len(content.messages if isinstance(content, Chat) else content.ids)


def as_content(value: Any, where: str) -> Content:
    """A value of a row, or an item of a list, as what a document holds. None and nan are empty text.

    Raises:
        DataError: neither text, messages nor ids.
    """
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, str):
        return checked(str(value), where)
    if hasattr(value, "__array__"):
        value = np.asarray(value).tolist()
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        if all(isinstance(item, Mapping) for item in value):
            return Chat(tuple(_message(item, where) for item in value))
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            return token_ids(value, where)
    raise DataError(
        f"{where} is a {type(value).__name__}: neither text, nor messages, nor token ids",
        hint="text is a string, a chat a list of messages, token ids a list of whole numbers",
    )


def checked(text: str, where: str) -> str:
    """The text, where it is text.

    Raises:
        DataError: it holds NUL characters, or half a character.
    """
    if "\0" in text:
        raise DataError(
            f"{where} holds NUL characters, the first at {text.index(chr(0))}: it is no text",
            hint="UTF-16 without a byte order mark looks so: iconv -f UTF-16LE -t UTF-8",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a character (a lone surrogate) at {error.start}: it is no Unicode text",
            hint='take it out: text.encode("utf-8", "ignore").decode()',
        ) from error
    return text


def token_ids(ids: Any, where: str) -> TokenIds:
    """Whole numbers from 0 on.

    Raises:
        DataError: others.
    """
    try:
        found = np.asarray(ids if len(ids) else np.zeros(0, np.int64))
    except (OverflowError, ValueError) as error:
        raise DataError(f"{where}: token ids must be one row of whole numbers: {error}") from error
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise DataError(
            f"{where}: token ids must be one row of whole numbers, got {found.dtype} "
            f"of shape {found.shape}"
        )
    if len(found) and found.dtype.kind == "i" and found.min() < 0:
        raise DataError(f"{where} holds the token id {found.min()}: ids begin at 0")
    return TokenIds(found)


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One message as chat templates take it. Fields that are null are left out: columns of a table hold them."""
    kept = {str(key): value for key, value in item.items() if value is not None}
    role = kept.pop("role", None) or kept.pop("from", None)
    text = kept.pop("content", None) or kept.pop("value", None) or ""
    if not isinstance(role, str):
        raise DataError(
            f"{where}: a message has no role; it has: {', '.join(map(str, item)) or 'nothing'}",
            hint='a message is {"role": "user", "content": "..."} or {"from": "human", "value": "..."}',
        )
    if isinstance(text, str):
        checked(text, where)
    return {"role": SPEAKERS.get(role, role), "content": text, **kept}
