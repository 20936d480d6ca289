"""Inputs of the probes that score tokens: ids of one length, and which of them are scored.

    repeated    opening, R random tokens, the same R tokens again              (`induction`, `copying`, `heads`)
    passkeys    task, filler, key, filler, question, the key again             (`passkey`)

Lists and needles in real text are made in `mismatch.probes.retrieval_prompts`.

All prompts of a `Prompts` have one length, so no padding is needed and they run as plain batches. A token at position t
is scored by its log-probability given tokens 0 .. t-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mismatch.errors import UsageError
from mismatch.probes.base import Setting

REPEAT = 64
"""Random tokens of a copy: as in the measurements that `induction` quotes."""

SHORTEST = 8
"""Fewest random tokens of a copy."""

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Prompts:
    """Prompts of one length.

    Attributes:
        ids: int64 `samples pos`.
        scored: bool `samples pos`: the token at this position is a target. Never the first one of a row.
        needle: first and last position of the needle.
    """

    ids: np.ndarray
    scored: np.ndarray
    needle: tuple[int, int]

    @property
    def length(self) -> int:
        """Tokens per prompt."""
        return self.ids.shape[1]

    def batches(self, size: int) -> list[Prompts]:
        """`size` prompts at a time."""
        return [
            Prompts(self.ids[i : i + size], self.scored[i : i + size], self.needle)
            for i in range(0, len(self.ids), size)
        ]

    def borders(self, segment: int) -> int:
        """Segment borders between the end of the needle and the first scored token: compressions of the needle."""
        asked = int(self.scored.any(0).argmax()) - 1  # the token in front of it predicts it
        return asked // segment - self.needle[1] // segment


def plain_tokens(vocab: int, tokenizer: Any) -> np.ndarray:
    """The ids that random tokens are drawn from, int64: all of a vocabulary but special and added ones."""
    special: set[int] = set()
    if tokenizer is not None:
        vocab = min(vocab, len(tokenizer))
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return np.array([i for i in range(vocab) if i not in special], np.int64)


def repeated(
    setting: Setting, count: int, name: str = "induction", length: int = REPEAT
) -> tuple[np.ndarray, int, int]:
    """Random tokens, twice.

    Args:
        setting: words, opening and seed.
        count: sequences.
        name: of the probe: seeds the draw.
        length: of a copy, R.

    Returns:
        ids int64 `count pos`, the position of the first random token, and R: less than `length` where the model's
        context is shorter.

    Raises:
        UsageError: a context without room for twice 8 tokens.
    """
    opening = setting.opening or (() if setting.bos is None else (setting.bos,))
    room = length if setting.context is None else (setting.context - len(opening)) // 2
    half = min(length, room)
    setting.fits(
        len(opening) + 2 * SHORTEST, "a repeated sequence", "this model is too short for the probe"
    )
    draw = setting.draw(name)
    # Without replacement where there are enough words: each token then occurs once in a copy.
    once = np.stack(
        [draw.choice(setting.words, half, replace=len(setting.words) < half) for _ in range(count)]
    )
    front = np.tile(np.array(opening, np.int64), (count, 1))
    return np.concatenate([front, once, once], 1).astype(np.int64), len(opening), half


def passkeys(
    setting: Setting, length: int, depth: float, keys: Sequence[str], hidden: Sequence[str]
) -> Prompts:
    """Passkey prompts of exactly `length` tokens, the answer included.

    The protocol of Landmark attention (arXiv 2305.16300) and LongLoRA (arXiv 2309.12307), with the needle at the
    border of a filler unit, and cut to the length in tokens, so that cells of one length are comparable.

    Args:
        setting: tokenizer, opening, context.
        length: tokens of each prompt.
        depth: share of the filler in front of the needle, 0..1.
        keys: what is asked for, one a sample.
        hidden: the keys in the needles; equal to `keys` except for the floor.

    Raises:
        UsageError: longer than the context, too short for task, needle and question, or a key that the tokenizer
            merges with the text around it.
    """
    setting.fits(length, "a passkey prompt", "take shorter --lengths")
    read = Encoder(setting.tokenizer, "passkey")
    lead, unit, question = read(FILLER), read(" " + FILLER), read(QUESTION)
    front = [*setting.opening, *read(TASK)]
    rows, needles, scored = [], [], np.zeros((len(keys), length), bool)
    for key, inside in zip(keys, hidden, strict=True):
        answer = read.answer(QUESTION, key)
        needle = read(NEEDLE.format(key=inside))
        room = length - len(front) - len(needle) - len(question) - len(answer)
        if room < 0:
            raise UsageError(
                f"a passkey prompt of {length} tokens has no room: task, needle and question take "
                f"{length - room}",
                hint=f"take --lengths {length - room} or more",
            )
        units = round(depth * (room // len(unit)))
        before = lead + unit * (units - 1) if units else []
        behind = (lead + unit * (room // len(unit) + 1))[: max(room - len(before), 0)]
        start = len(front) + len(before)
        rows.append(front + before + needle + behind + question + answer)
        needles.append((start, start + len(needle) - 1))
        scored[len(rows) - 1, -len(answer) :] = [read.shows(token) for token in answer]
    first, last = zip(*needles, strict=True)
    return Prompts(np.array(rows, np.int64), scored, (min(first), max(last)))


class Encoder:
    """Text to ids, without special tokens.

    Args:
        tokenizer: of the model.
        probe: that asks, for errors.

    Raises:
        UsageError: there is no tokenizer.
    """

    def __init__(self, tokenizer: Any, probe: str) -> None:
        if tokenizer is None:
            raise UsageError(
                f"the probe {probe} needs the model's tokenizer, and there is none",
                hint="load the model with its tokenizer: mismatch.load((model, tokenizer))",
            )
        self.tokenizer, self.probe = tokenizer, probe

    def __call__(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def shows(self, token: int) -> bool:
        """Whether a token is more than white space, and so part of the key."""
        return bool(self.tokenizer.decode([token]).strip())

    def answer(self, question: str, key: str) -> list[int]:
        """The tokens of ` key` behind the question.

        Raises:
            UsageError: the key behind the question changes the question's tokens, or does not decode to itself.
        """
        front = self(question)
        whole = self(f"{question} {key}")
        answer = whole[len(front) :]
        back = self.tokenizer.decode(answer).strip() if answer else ""
        if whole[: len(front)] != front or back != key:
            raise UsageError(
                f"the key {key} does not tokenise: behind the question it reads back as `{back}`",
                hint=f"this tokenizer does not encode digits one by one; leave the probe `{self.probe}` out",
            )
        return answer
