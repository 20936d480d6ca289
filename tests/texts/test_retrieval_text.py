"""Retrieval-shaped training text: what stands in it, from where, and that it is the same again."""

from __future__ import annotations

import re

import numpy as np
import pytest
from asking import Letters

from mismatch.texts.retrieval import LEAST, NAME, made_tokens, mixed, retrieval_windows, unable
from mismatch.texts.windows import Source, Windows
from mismatch.texts.wordings import TRAINING, TRAINING_LISTS, TRAINING_NOUNS

SIZE = 600
MARKS = "~^@#%&"
"""The training text is made of these: no wording holds one."""
KINDS = ("needles", "copies", "repeats", "lists")
READ = Letters().decode


def text(windows=5, prefix=()):
    draw = np.random.default_rng(1)
    bodies = [draw.choice(list(MARKS), SIZE - len(prefix)) for _ in range(windows)]
    rows = np.array([[*prefix, *Letters()("".join(body)).input_ids] for body in bodies], np.int64)
    return Windows(
        ids=rows, doc=np.arange(windows), offset=np.zeros(windows, np.int64),
        scored=np.ones(rows.shape, bool), names=tuple(f"d{i}" for i in range(windows)),
        asked=rows.size, prefix=prefix, source=Source(windows),
    )  # fmt: skip


def made(count=16, seed=0, **changes):
    return retrieval_windows(text(**changes), Letters(), np.arange(3, 99), count * SIZE, seed)


def of_kind(kind, windows):
    return [READ(row) for row in windows.ids[KINDS.index(kind) :: len(KINDS)]]


def found(template, window):
    """The pairs that a template says in a window."""
    parts = (f"(?P<{p[1:-1]}>[\\w ]+?)" if p[0] == "{" else re.escape(p)
             for p in re.split(r"(\{\w+\})", template) if p)  # fmt: skip
    pattern = re.compile("^" + "".join(parts) + "$", re.MULTILINE)
    return [(match["name"], match["value"]) for match in pattern.finditer(window)]


def test_windows_are_as_long_as_those_of_the_text_and_follow_from_the_seed():
    first, again, other = made(), made(), made(seed=1)
    assert first.ids.shape == (16, SIZE) and first.names == (NAME,)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert (made(prefix=(1,)).ids[:, 0] == 1).all()


def test_what_is_asked_for_stands_in_the_text():
    for window in of_kind("needles", made(40)):
        last = window.rpartition("\n")[2]
        answers = [
            (one, pair) for one in TRAINING for pair in found(one.question + " {value}", last)
        ]
        assert answers, last
        assert any(pair in found(one.statement, window) for one, pair in answers)


def test_a_span_of_the_text_stands_twice():
    own = READ(text().ids.reshape(-1))
    longest = max(own.count(own[i : i + 16]) for i in range(0, SIZE - 16))
    assert longest == 1  # by chance there is none
    for window in of_kind("copies", made(24)):
        assert any(window.count(window[i : i + 16]) > 1 for i in range(SIZE - 16))


def test_random_tokens_come_again():
    for window in of_kind("repeats", made(40)):
        assert any(window.count(window[i : i + 20]) > 1 for i in range(SIZE - 20))
        assert len(set(window)) > 20  # not only the text


def test_a_list_is_asked_for_its_own_pairs():
    for window in of_kind("lists", made(40)):
        front, _, tail = re.split(f"([{re.escape(MARKS)}]+)", window + MARKS, maxsplit=1)
        if not set(tail) - set(MARKS):  # no text in between
            front, tail = window[: SIZE // 2], window[SIZE // 2 :]
        asked = [noun for noun in TRAINING_NOUNS if re.search(rf"\b{noun}\b", tail)]
        assert asked and all(noun in front for noun in asked)
    assert all(how.index("{name}") < how.index("{value}") for how in TRAINING_LISTS)


def test_the_text_in_between_is_the_training_text():
    source = [READ(row) for row in text().ids]
    for window in (w for kind in ("needles", "lists") for w in of_kind(kind, made(24))):
        for piece in re.findall(f"[{re.escape(MARKS)}]+", window):
            assert any(piece in one for one in source)


def test_both_are_mixed_evenly():
    read, own = text(12), made(4)
    both = mixed(read, own)
    assert len(both) == 16 and both.n_docs == 13 and made_tokens(both) == 4 * SIZE
    assert made_tokens(read) == 0
    for part in (8, 12):
        assert made_tokens(both.part(slice(part))) == part // 4 * SIZE
    assert sorted(map(bytes, both.ids)) == sorted(map(bytes, [*read.ids, *own.ids]))


class Dropping(Letters):
    def decode(self, ids):
        return ""


@pytest.mark.parametrize(
    ("tokenizer", "seq_len", "why"),
    [
        (Letters(), LEAST, None),
        (Letters(), LEAST - 1, "nothing stands far back"),
        (Dropping(), LEAST, "does not give digits back"),
    ],
)
def test_what_cannot_be_made_says_why(tokenizer, seq_len, why):
    said = unable(tokenizer, seq_len)
    assert said is None if why is None else why in said
