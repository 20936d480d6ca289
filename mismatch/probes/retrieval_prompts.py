"""Prompts in which something is looked up, and how they are asked.

    lookups    a list of pairs, text, one pair asked for in the same words     (`kv_lookup`, the judge of a repair)
    needles    text with sentences hidden in it, one of them asked for         (`needles`, the judge of a repair)
    ask        the scored tokens of every model                                (those two and `passkey`)

The text is the run's own held-out text where there is some, else the filler of the passkey, which is easier. Names are
drawn per prompt, values are random digits. `absent` leaves out the pair that is asked for, and another one stands in
its place: what such a prompt reads is the value of not finding it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mismatch.errors import UsageError
from mismatch.forward.head import scores
from mismatch.forward.hooks import on_device
from mismatch.forward.shared_prefix import finals
from mismatch.probes.base import Measure, Setting, Subject
from mismatch.probes.inputs import FILLER, Encoder, Prompts
from mismatch.texts.wordings import Set

PAIRS, LIST_LENGTH = 12, 328
"""A list and the tokens of its prompt: there SmolLM2-135M still reads, at .55 nats a digit."""
NEEDLES = 3
"""Sentences in a text, of which one is asked for."""
LIST_DIGITS, NEEDLE_DIGITS = 5, 7


@dataclass(frozen=True)
class Replies:
    """What one model made of some prompts, float64 `samples` each.

    Attributes:
        logprob: of the scored tokens, summed.
        exact: 1 where every one of them is the likeliest.
        tokens: how many are scored.
    """

    logprob: np.ndarray
    exact: np.ndarray
    tokens: np.ndarray

    @property
    def n(self) -> int:
        """Scored tokens of all prompts."""
        return int(self.tokens.sum())

    def per_token(self, stat: str, **address: Any) -> Measure:
        """Nats per scored token."""
        return Measure(stat, self.logprob, self.tokens, self.n, **address)

    def found(self, stat: str, **address: Any) -> Measure:
        """The share of prompts that are answered."""
        return Measure(stat, self.exact, np.ones(len(self.exact)), len(self.exact), **address)

    @classmethod
    def joined(cls, cells: Sequence[Replies]) -> Replies:
        """The same samples under several conditions; `exact` is the mean over them."""
        added = [sum(getattr(cell, name) for cell in cells) for name in ("logprob", "tokens")]
        return cls(added[0], np.mean([cell.exact for cell in cells], axis=0), added[1])


def ask(subjects: Sequence[Subject], prompts: Prompts, setting: Setting) -> dict[str, Replies]:
    """The replies of each model by its name.

    Args:
        subjects: the teacher first.
        prompts: of one length.
        setting: of the probe.
    """

    def one(part: slice) -> dict[tuple[str, str], np.ndarray]:
        replies = {}
        ids = on_device(subjects[0].layout, prompts.ids[part])
        scored = torch.from_numpy(prompts.scored[part]).to(ids.device)
        for subject, final in finals(subjects, ids):
            value, right = scores(subject.layout, final, ids, scored)
            replies[subject.name, "logprob"] = value.sum(1).numpy()
            replies[subject.name, "exact"] = right.all(1).numpy()
        return replies

    with torch.no_grad():
        found = setting.by_batch(len(prompts.ids), one)
    tokens = prompts.scored.sum(1).astype(float)
    return {
        s.name: Replies(found[s.name, "logprob"], found[s.name, "exact"].astype(float), tokens)
        for s in subjects
    }


def lookups(
    setting: Setting,
    said: Set,
    probe: str,
    *,
    pairs: int = PAIRS,
    length: int = LIST_LENGTH,
    samples: int | None = None,
    absent: bool = False,
) -> Prompts:
    """Lists of pairs, one a line; text up to the length; one pair asked for in the words of its line.

    Args:
        setting: tokenizer, opening, text, context, seed.
        said: the wording, and the words of names.
        probe: its name: seeds the draw, and is named in errors.
        pairs: lines of a list.
        length: tokens of a prompt, the answer included.
        samples: prompts; None: as the setting says.
        absent: the pair that is asked for is not in the list.

    Raises:
        UsageError: no tokenizer, longer than the context, fewer pairs fit, a value that does not tokenise.
    """
    setting.fits(length, f"a prompt of {probe}", "take shorter ones")
    read, draw = Encoder(setting.tokenizer, probe), setting.draw(probe)
    text = _Haystack(setting, read)
    if pairs >= len(said.nouns):
        raise UsageError(
            f"{pairs} pairs are more than there are names for: {len(said.nouns) - 1}",
            hint=f"take {len(said.nouns) - 1} pairs or fewer",
        )
    rows, places = [], []
    for _ in range(samples or setting.samples):
        names = said.names(pairs + 1, draw, several=False)
        values = _values(pairs + 1, LIST_DIGITS, draw)
        at = int(draw.integers(pairs))
        start = int(draw.integers(len(text)))
        asked, value = names[at], values[at]
        if absent:
            names[at], values[at] = names[-1], values[-1]
        lines = [
            read(said.lookup.said(name, v))
            for name, v in zip(names[:pairs], values[:pairs], strict=True)
        ]
        question = read("\n\n" + said.lookup.asked(asked))
        answer = read.answer("\n\n" + said.lookup.asked(asked), value)
        front = [*setting.opening]
        room = length - len(front) - len(question) - len(answer)
        ends = np.cumsum([len(line) for line in lines])
        if ends[-1] > room:
            fit = int((ends <= room).sum())
            raise UsageError(
                f"{pairs} pairs do not fit into a prompt of {probe} of {length} tokens: "
                f"{f'{fit} fit' if fit else 'not one fits'}",
                hint=f"take {fit} pairs or fewer, or longer prompts"
                if fit
                else "take longer prompts",
            )
        body = [token for line in lines for token in line]
        rows.append((front + body + text.take(start, room - len(body)) + question, answer))
        first = len(front) + int(ends[at]) - len(lines[at])
        places.append((first, first + len(lines[at]) - 1))
    return _prompts(read, rows, places)


def needles(
    setting: Setting,
    said: Set,
    probe: str,
    *,
    length: int,
    depth: float,
    samples: int | None = None,
    absent: bool = False,
) -> Prompts:
    """Text with several sentences hidden in it; one is asked for. Names, values and texts are the same at every length
    and depth.

    Args:
        setting: tokenizer, opening, text, context, seed.
        said: the wording, and the words of names.
        probe: its name: seeds the draw, and is named in errors.
        length: tokens of a prompt, the answer included.
        depth: share of the text in front of the sentence that is asked for, 0..1; the others stand anywhere.
        samples: prompts; None: as the setting says.
        absent: the sentence that is asked for is not in the text.

    Raises:
        UsageError: no tokenizer, longer than the context, no room for the sentences, a value that does not tokenise.
    """
    setting.fits(length, f"a prompt of {probe}", "take shorter ones")
    read, draw = Encoder(setting.tokenizer, probe), setting.draw(probe)
    text = _Haystack(setting, read)
    rows, places = [], []
    for _ in range(samples or setting.samples):
        names = said.names(NEEDLES + 1, draw, several=True)
        values = _values(NEEDLES + 1, NEEDLE_DIGITS, draw)
        others, start = draw.random(NEEDLES - 1), int(draw.integers(len(text)))
        asked, value = names[0], values[0]
        if absent:
            names[0], values[0] = names[-1], values[-1]
        hidden = [
            read(said.needle.said(name, v))
            for name, v in zip(names[:NEEDLES], values[:NEEDLES], strict=True)
        ]
        question = read(said.needle.asked(asked))
        answer = read.answer(said.needle.asked(asked), value)
        fixed = len(setting.opening) + sum(map(len, hidden)) + len(question) + len(answer)
        if fixed > length:
            raise UsageError(
                f"a prompt of {probe} of {length} tokens has no room: {NEEDLES} sentences and the question "
                f"take {fixed}",
                hint=f"take prompts of {fixed} tokens or more",
            )
        room = length - fixed
        cuts = [round(share * room) for share in (depth, *others)]
        row, cut = list(setting.opening), 0
        for at in sorted(range(NEEDLES), key=lambda at: (cuts[at], at)):
            row += text.take(start + cut, cuts[at] - cut)
            cut = cuts[at]
            if at == 0:
                places.append((len(row), len(row) + len(hidden[at]) - 1))
            row += hidden[at]
        rows.append((row + text.take(start + cut, room - cut) + question, answer))
    return _prompts(read, rows, places)


class _Haystack:
    """Tokens of held-out text, window after window, from any place on and around again."""

    def __init__(self, setting: Setting, read: Encoder) -> None:
        windows = setting.text[:, len(setting.opening) :]
        self.ids = windows.reshape(-1) if windows.size else np.array(read(FILLER + " "), np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, start: int, count: int) -> list[int]:
        return self.ids.take(np.arange(start, start + count), mode="wrap").tolist()


def _values(count: int, digits: int, draw: Any) -> list[str]:
    """Numbers that do not begin with 0, no two alike."""
    low = 10 ** (digits - 1)
    return [str(low + n) for n in draw.choice(9 * low, count, replace=False)]


def _prompts(
    read: Encoder, rows: Sequence[tuple[list[int], list[int]]], places: Sequence[tuple[int, int]]
) -> Prompts:
    ids = np.array([front + answer for front, answer in rows], np.int64)
    scored = np.zeros(ids.shape, bool)
    for row, (front, answer) in enumerate(rows):
        scored[row, len(front) :] = [read.shows(token) for token in answer]
    first, last = zip(*places, strict=True)
    return Prompts(ids, scored, (min(first), max(last)))
