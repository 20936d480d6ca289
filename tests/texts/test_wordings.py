"""No wording and no name that is evaluated or selected on stands in training text, nor the other way round."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mismatch.probes import inputs
from mismatch.texts import wordings as w

PASSKEY = (inputs.TASK, inputs.FILLER, inputs.NEEDLE, inputs.QUESTION)


def texts(found):
    return [text for one in (found.lookup, found.needle) for text in (one.statement, one.question)]


SETS = {
    "evaluation": [*texts(w.EVALUATION), *PASSKEY],
    "selection": texts(w.SELECTION),
    "training": [t for one in w.TRAINING for t in (one.statement, one.question)]
    + list(w.TRAINING_LISTS),
}
NAMES = {
    "evaluation": [*w.EVALUATION.adjectives, *w.EVALUATION.nouns],
    "selection": [*w.SELECTION.adjectives, *w.SELECTION.nouns],
    "training": [*w.TRAINING_ADJECTIVES, *w.TRAINING_NOUNS],
}
PAIRS = [("evaluation", "training"), ("selection", "training"), ("evaluation", "selection")]


def long_words(texts):
    plain = (re.sub(r"\{\w+\}", "", text).lower() for text in texts)
    return {word for text in plain for word in re.findall("[a-z]{5,}", text)}


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_no_template_and_no_word_that_tells_one_is_in_two_sets(one, other):
    assert not set(SETS[one]) & set(SETS[other])
    assert not long_words(SETS[one]) & long_words(SETS[other])


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_names_are_of_disjoint_lists(one, other):
    first, second = ({word.lower() for word in NAMES[at]} for at in (one, other))
    assert not first & second
    assert not first & long_words(SETS[other]) and not second & long_words(SETS[one])


def test_every_list_holds_a_word_once():
    for found in NAMES.values():
        assert len({word.lower() for word in found}) == len(found)


def test_a_statement_holds_what_is_asked_for():
    every = [w.EVALUATION.lookup, w.EVALUATION.needle, w.SELECTION.lookup, w.SELECTION.needle]
    for one in [*every, *w.TRAINING]:
        said, asked = one.said("otter", "123"), one.asked("otter")
        assert "otter" in said and "123" in said
        assert "otter" in asked and "123" not in asked and not asked.endswith(" ")


def test_names_are_drawn_without_repeats():
    draw = np.random.default_rng(0)
    assert len(set(w.EVALUATION.names(20, draw, several=False))) == 20
    assert all("-" in name for name in w.SELECTION.names(6, draw, several=True))
