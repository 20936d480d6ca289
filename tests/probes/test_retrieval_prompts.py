"""Lists and needles: what stands in a prompt, what is scored, and what cannot be asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from asking import LENGTH, Letters, log_softmax, setting, student, subjects
from random_models import build

from mismatch.errors import UsageError
from mismatch.probes.base import Subject
from mismatch.probes.copying import Copying, far_sources
from mismatch.probes.inputs import FILLER
from mismatch.probes.kv_lookup import KvLookup
from mismatch.probes.needles import Needles
from mismatch.probes.retrieval_prompts import NEEDLES, lookups, needles
from mismatch.texts.wordings import EVALUATION

READ = Letters().decode


def some_text(letters):
    """A setting whose held-out text is readable and its own."""
    ids = np.array([Letters()(letters).input_ids] * 2)
    return setting(text=ids)


@pytest.mark.parametrize("length", [240, 301])
def test_a_list_is_followed_by_text_and_a_question_in_its_own_words(length):
    made = lookups(some_text("qwxyz~" * 20), EVALUATION, "kv_lookup", pairs=4, length=length)
    assert made.ids.shape == (4, length) == made.scored.shape
    for row, scored in zip(made.ids, made.scored, strict=True):
        whole, value = READ(row), READ(row[scored])
        front, _, question = whole.rpartition("\n\n")
        *lines, text = front.split("\n")
        assert len(lines) == 4 == len(set(lines)) and set(text) <= set("qwxyz~")
        asked = question.removesuffix(f" {value}")
        assert f"{asked} {value}." in lines and value.isdigit() and len(value) == 5
        assert sum(asked in line for line in lines) == 1
    first, last = made.needle
    assert 0 <= first < last < length


def test_the_pair_that_is_asked_for_can_be_absent():
    given = {"pairs": 4, "length": 240}
    there, gone = (lookups(setting(), EVALUATION, "x", **given, absent=out) for out in (0, 1))
    assert (there.scored == gone.scored).all()
    for with_it, without in zip(there.ids, gone.ids, strict=True):
        whole, _, question = READ(without).rpartition("\n\n")
        assert READ(with_it).rpartition("\n\n")[2] == question  # the same question and value
        assert question not in whole and question.rsplit(" ", 1)[0] not in whole


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_needles_stand_in_the_text_of_the_run(depth):
    words = some_text("qwxyz~" * 20)
    made = needles(words, EVALUATION, "needles", length=LENGTH, depth=depth)
    first, last = made.needle
    for row, scored in zip(made.ids, made.scored, strict=True):
        whole, value = READ(row), READ(row[scored])
        assert len(row) == LENGTH and len(value) == 7
        said = [line for line in whole.split("\n") if line.startswith("One of the special magic")]
        assert len(said) == NEEDLES and sum(f"is: {value}." in line for line in said) == 1
        assert whole.endswith(f"is: {value}")
        assert first <= whole.index(f"is: {value}.") <= last
    starts = [
        needles(words, EVALUATION, "needles", length=LENGTH, depth=d).needle[0] for d in (0, 0.5, 1)
    ]
    assert starts == sorted(starts) and starts[0] < starts[-1]


def test_without_text_there_is_the_filler():
    empty = setting(windows=2, text=np.zeros((0, 80), np.int64))
    made = lookups(empty, EVALUATION, "x", pairs=1, length=240)
    gap = READ(made.ids[0]).rpartition("\n\n")[0].split("\n", 1)[1]
    assert gap in (FILLER + " ") * 9


def test_values_and_names_do_not_depend_on_length_and_depth():
    one = needles(setting(), EVALUATION, "needles", length=LENGTH, depth=0.1)
    other = needles(setting(), EVALUATION, "needles", length=LENGTH + 40, depth=0.9)
    for a, b in zip(one.ids, other.ids, strict=True):
        assert READ(a).rsplit("\n", 1)[1] == READ(b).rsplit("\n", 1)[1]


def test_what_cannot_be_asked():
    with pytest.raises(
        UsageError, match=r"12 pairs do not fit into a prompt of kv_lookup of 240 tokens: [45] fit"
    ):
        lookups(setting(), EVALUATION, "kv_lookup", length=240)
    with pytest.raises(UsageError, match="of 40 tokens: not one fits"):
        lookups(setting(), EVALUATION, "kv_lookup", length=40)
    with pytest.raises(UsageError, match="40 pairs are more than there are names for: 31"):
        lookups(setting(), EVALUATION, "kv_lookup", pairs=40)
    with pytest.raises(UsageError, match="600 tokens is longer than the context of the model: 512"):
        needles(setting(), EVALUATION, "needles", length=600, depth=0)
    with pytest.raises(UsageError, match=r"of 90 tokens has no room: 3 sentences and the question"):
        needles(setting(), EVALUATION, "needles", length=90, depth=0)
    with pytest.raises(UsageError, match="the probe needles needs the model's tokenizer"):
        needles(setting(tokenizer=None), EVALUATION, "needles", length=LENGTH, depth=0)


def test_digits_that_the_tokenizer_merges_with_the_question_or_drops():
    class Worded(Letters):
        def __call__(self, text, **_):
            return super().__call__("".join(c for c in text if not c.isdigit()))

    for made in (KvLookup, Needles):
        with pytest.raises(UsageError, match=r"does not tokenise: [\s\S]* leave the probe"):
            made(setting(tokenizer=Worded()))


@pytest.mark.parametrize("kind", [KvLookup, Needles])
def test_they_are_the_log_probability_of_a_plain_forward(kind):
    model = build("llama")
    made = student(model, "layer1:infini(segment=64)")
    probe = kind(setting())
    answers = probe.run([subjects(model, "layer1:nope")[0], Subject.of(made)])
    cells = list(probe.cells.values()) if kind is Needles else [probe.prompts]
    for name, whole in (("teacher", model), ("swap", made.model)):
        found = []
        for prompts in cells:
            ids = torch.from_numpy(prompts.ids)
            plain = log_softmax(whole, ids)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            found.append(plain[torch.from_numpy(prompts.scored)[:, 1:]])
        got = {m.stat: m.value() for m in answers[name]}
        assert got["logprob"] == pytest.approx(float(torch.cat(found).mean()), abs=1e-5)
        assert 0 <= got["exact"] <= 1 and got["logprob_absent"] < 0


def test_a_source_is_far_beyond_the_own_and_the_previous_segment():
    """By what a local layer can see: own and previous segment of the position that predicts."""
    repeat, segment, first = 24, 16, 1
    end = first + 2 * repeat
    far = far_sources(first + repeat + 1, end, repeat, segment)
    for found, target in zip(far, range(first + repeat + 1, end), strict=True):
        at = target - 1
        seen = range((at // segment - 1) * segment, at + 1)
        assert found == (target - repeat not in seen)
    assert 0 < far.mean() < 1


def test_copies_are_scored_near_and_far():
    model = build("llama")
    made = student(model, "layer1:infini(segment=64)")
    probe = Copying(setting())
    answers = probe.run([subjects(model, "layer1:nope")[0], Subject.of(made)])
    assert list(probe.spans) == [32, 100, 160]
    values, fars = [], []
    for repeat, (ids, start) in probe.spans.items():
        ids = torch.from_numpy(ids)
        nll = -log_softmax(made.model, ids)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        second = nll[:, start + repeat :]  # the prediction of the token behind it
        values.append(second)
        fars.append(far_sources(start + repeat + 1, ids.shape[1], repeat, 64))
        got = {m.stat: m.value() for m in answers["swap"]}
        assert got[f"nll_second[repeat={repeat}]"] == pytest.approx(float(second.mean()), abs=1e-5)
    far = torch.from_numpy(np.concatenate(fars))
    whole = torch.cat(values, 1)
    assert got["nll_far"] == pytest.approx(float(whole[:, far].mean()), abs=1e-5)
    assert got["nll_near"] == pytest.approx(float(whole[:, ~far].mean()), abs=1e-5)


def test_a_context_without_far_sources_says_so():
    probe = Copying(setting(context=70))
    assert list(probe.spans) == [32, 34]
    answers = probe.run(subjects(build("llama"), "layer1:nope"))
    got = {m.stat: m for m in answers["teacher"]}
    assert got["nll_far"].n == 0 and np.isnan(got["nll_far"].value())
    assert got["nll_near"].n > 0
