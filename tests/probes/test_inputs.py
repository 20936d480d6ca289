"""The inputs: exact lengths, where the key stands, what is scored; and what cannot be asked."""

from __future__ import annotations

import numpy as np
import pytest
from asking import LENGTH, Letters, setting

from mismatch.errors import UsageError
from mismatch.probes.inputs import NEEDLE, QUESTION, REPEAT, TASK, passkeys, repeated

KEYS = ["12345", "90210", "55555"]


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [LENGTH, LENGTH + 57])
def test_a_passkey_prompt_is_what_it_says(depth, length):
    prompts = passkeys(setting(), length, depth, KEYS, KEYS)
    assert prompts.ids.shape == (3, length) == prompts.scored.shape
    first, last = prompts.needle
    for row, scored, key in zip(prompts.ids, prompts.scored, KEYS, strict=True):
        text = Letters().decode(row)
        assert text.startswith(TASK) and text.endswith(f"{QUESTION} {key}")
        assert text[first : last + 1] == NEEDLE.format(key=key)
        assert Letters().decode(row[scored]) == key  # the space in front is given
        assert scored[-5:].all() and scored.sum() == 5


def test_depth_goes_from_the_task_to_the_question():
    starts = [passkeys(setting(), 510, d, KEYS, KEYS).needle[0] for d in (0.0, 0.5, 1.0)]
    assert starts[0] == len(TASK)
    assert starts == sorted(starts) and starts[-1] > starts[0]


def test_borders_between_needle_and_question():
    prompts = passkeys(setting(), LENGTH, 0.0, KEYS, KEYS)
    _, last = prompts.needle
    asked = LENGTH - 6  # the space in front of the first digit
    for segment in (16, 64, 1000):
        assert prompts.borders(segment) == asked // segment - last // segment
    assert prompts.borders(1000) == 0


def test_a_needle_with_another_key():
    prompts = passkeys(setting(), LENGTH, 0.0, KEYS, KEYS[::-1])
    text = Letters().decode(prompts.ids[0])
    assert "55555" in text and text.count("12345") == 1


def test_what_the_tokenizer_puts_in_front_stays_in_front():
    prompts = passkeys(setting(opening=(1,)), LENGTH, 0.0, KEYS, KEYS)
    assert (prompts.ids[:, 0] == 1).all() and prompts.ids.shape[1] == LENGTH


def test_too_long_and_too_short():
    with pytest.raises(UsageError, match="600 tokens is longer than the context of the model: 512"):
        passkeys(setting(), 600, 0.0, KEYS, KEYS)
    with pytest.raises(
        UsageError, match=r"50 tokens has no room[\s\S]*take --lengths 25\d or more"
    ):
        passkeys(setting(), 50, 0.0, KEYS, KEYS)


def test_a_key_that_does_not_tokenise():
    class Worded(Letters):
        def __call__(self, text, **_):
            return super().__call__("".join(c for c in text if not c.isdigit()))

    with pytest.raises(UsageError, match=r"the key 12345 does not tokenise: .* reads back as ``"):
        passkeys(setting(tokenizer=Worded()), LENGTH, 0.0, KEYS, KEYS)
    with pytest.raises(UsageError, match="the probe passkey needs the model's tokenizer"):
        passkeys(setting(tokenizer=None), LENGTH, 0.0, KEYS, KEYS)


def test_repeated_tokens():
    ids, start, half = repeated(setting(), 5)
    assert (start, half) == (1, REPEAT) and ids.shape == (5, 1 + 2 * REPEAT)
    assert (ids[:, 0] == 1).all()
    assert (ids[:, 1 : 1 + half] == ids[:, 1 + half :]).all()
    assert all(len(set(row[1 : 1 + half])) == half for row in ids)  # one place to be found at
    again, _, _ = repeated(setting(seed=1), 5)
    assert not np.array_equal(ids, again)


def test_a_short_context_gets_shorter_copies():
    ids, start, half = repeated(setting(context=60, opening=(5,)), 2)
    assert (start, half) == (1, 29) and ids.shape[1] <= 60
    with pytest.raises(UsageError, match="a repeated sequence of 17 tokens is longer than the"):
        repeated(setting(context=12), 2)


def test_too_little_text():
    with pytest.raises(UsageError, match=r"heads needs at least 2 windows of text, and there is 1"):
        setting(windows=1).windows("heads")
