"""Chats as token ids, by the tokenizer's own template, and which predictions are of an answer."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mismatch.errors import DataError
from mismatch.texts import documents as data
from mismatch.texts.contents import Chat
from mismatch.texts.tokens import encode
from mismatch.texts.windows import windows

WORDS = ["<s>", "system", "user", "assistant", "end", "hi", "yes", "no", "what", "think"]
PLAIN = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} end {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }} end "
    "{% endgeneration %}{% else %}{{ m.content }} end {% endif %}{% endfor %}"
)
FORGETFUL = (  # what was thought is left out once more follows
    "{% for m in messages %}{{ m.role }} {% if m.thought and loop.last %}{{ m.thought }} {% endif %}"
    "{{ m.content }} end {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
TALK = Chat(
    (
        {"role": "user", "content": "what"},
        {"role": "assistant", "content": "yes no"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "no", "thought": "think"},
    )
)
WRITTEN = "user what end assistant yes no end user hi end assistant no end"
ANSWERS = ["yes", "no", "end", "no", "end"]


def tokenizer_of(template: str | None) -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer


def text_of(ids: np.ndarray) -> str:
    return " ".join(WORDS[i] for i in ids)


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_answers_are_what_the_assistant_says(template):
    tokenizer = tokenizer_of(template)
    ids, scored = encode(TALK, "talk", tokenizer, answers=True)
    assert text_of(ids) == WRITTEN
    behind = np.append(
        ids[1:], -1
    )  # a prediction counts where the token that it is of is part of an answer
    assert text_of(behind[scored]) == " ".join(ANSWERS)
    every, none = encode(TALK, "talk", tokenizer)
    assert (every == ids).all()
    assert none is None


def test_where_an_answer_begins_must_be_told():
    with pytest.raises(DataError, match="talk: where an answer begins cannot be told") as error:
        encode(
            Chat((*TALK.messages, {"role": "user", "content": "hi"})),
            "talk",
            tokenizer_of(FORGETFUL),
            answers=True,
        )
    assert "--answers-only" in error.value.hint


def test_no_template_no_chat():
    with pytest.raises(
        DataError, match="talk is a chat, and the model's tokenizer has no chat template"
    ):
        encode(TALK, "talk", tokenizer_of(None))


def test_a_chat_that_the_template_refuses():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"talk: the chat template refuses .*roles must alternate"):
        encode(TALK, "talk", tokenizer_of(template))


def test_text_holds_no_answers():
    with pytest.raises(DataError, match="text 0 is no chat, so it holds no answers") as error:
        windows(data.read(["hi yes " * 20]), tokenizer_of(PLAIN), 8, 80, answers=True)
    assert "--answers-only" in error.value.hint


def talks(count: int, turns: int = 6) -> data.Documents:
    rows = []
    for n in range(count):
        said = [
            {"from": who, "value": " ".join(["hi", "yes"][: 1 + n % 2] * (1 + n))}
            for who in ("human", "gpt") * turns
        ]
        rows.append({"conversations": said})
    return data.read(rows)


def test_windows_of_chats_carry_what_counts():
    tokenizer = tokenizer_of(PLAIN)
    every = windows(talks(4), tokenizer, 8, 10_000)
    assert every.scored.all()
    cut = windows(talks(4), tokenizer, 8, 10_000, answers=True)
    assert cut.scored.any(1).all()  # no window that counts for nothing
    assert 0 < cut.scored.sum() < cut.scored.size
    assert cut.fingerprint != every.fingerprint
    user, assistant = WORDS.index("user"), WORDS.index("assistant")
    for ids, scored, offset in zip(cut.ids, cut.scored, cut.offset, strict=True):
        at = np.flatnonzero(ids == user)
        assert not scored[at].any()  # it predicts what the user says
        assert not scored[at[at > 0] - 1].any()  # it predicts who speaks
        assert scored[ids == assistant].all()
        assert offset % 8 == 0


def test_windows_without_an_answer_are_none():
    rows = [{"messages": [{"role": "user", "content": "hi " * 40}]}]
    with pytest.raises(DataError, match="no window of --seq-len 8 holds a token of an answer"):
        windows(data.read(rows), tokenizer_of(PLAIN), 8, 80, answers=True)


def test_equal_chats_are_copies():
    rows = [{"messages": [*TALK.messages]}, {"messages": [*TALK.messages]}]
    found = data.read(rows)
    assert len(found) == 1
    assert found.copies == 1
