"""Windows: what is in them, in which order, from which document, and how far text is tokenised."""

from __future__ import annotations

import time

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mismatch.errors import DataError
from mismatch.texts import cutting
from mismatch.texts.documents import Documents
from mismatch.texts.windows import prefix_ids, windows

WORDS = 1000


def word_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """`w17` is token 17; `template` places <s> = 0 and </s> = 1 around a text."""
    vocab = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def document(first: int, length: int) -> str:
    return " ".join(f"w{i}" for i in range(first, first + length))


def corpus(*lengths: int) -> Documents:
    """Document k holds the tokens 100 (k + 1), 100 (k + 1) + 1, ..."""
    texts = tuple(document(100 * (k + 1), n) for k, n in enumerate(lengths))
    return Documents("corpus", tuple(f"d{k}" for k in range(len(texts))), texts)


def test_windows_are_full_consecutive_and_never_mix_documents():
    cut = windows(corpus(25, 9, 40, 10), word_tokenizer(), seq_len=10, tokens=10_000)
    assert cut.ids.shape == (7, 10)
    assert cut.ids.dtype == np.int64
    assert (np.diff(cut.ids, axis=1) == 1).all()
    owners = cut.ids[:, 0] // 100 - 1
    assert [cut.names[d] for d in cut.doc] == [f"d{k}" for k in owners]
    starts = sorted(cut.ids[:, 0].tolist())
    assert starts == [100, 110, 300, 310, 320, 330, 400]  # d1 is too short, tails are dropped
    assert cut.tokens == 70
    assert cut.asked == 10_000


def test_each_document_gives_one_window_in_turn():
    cut = windows(corpus(30, 30, 30, 30), word_tokenizer(), seq_len=10, tokens=90)
    assert cut.doc.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert cut.n_docs == 4
    assert len(set(cut.ids[:, 0].tolist())) == 9  # none twice


def test_few_windows_come_from_anywhere_in_their_documents():
    """The opening of a document is not like the rest: an average over first windows is not one over the text."""
    cut = windows(corpus(*[95] * 8), word_tokenizer(), seq_len=10, tokens=80)
    places = cut.ids[:, 0] % 100 // 10
    assert len(set(places.tolist())) > 4
    assert 2 < places.mean() < 6
    again = windows(corpus(*[95] * 8), word_tokenizer(), seq_len=10, tokens=80)
    assert (again.ids == cut.ids).all()
    whole = windows(corpus(*[95] * 8), word_tokenizer(), seq_len=10, tokens=10_000)
    assert sorted(whole.ids[:, 0] % 100 // 10) == sorted(
        [*range(9)] * 8
    )  # all of it, where it is asked for


def test_the_offset_is_the_place_of_a_window_in_its_document():
    cut = windows(corpus(47, 60), word_tokenizer("<s> $A"), seq_len=10, tokens=10_000)
    assert (cut.ids[:, 1] % 100 == cut.offset).all()
    assert sorted(cut.offset[cut.ids[:, 1] < 200]) == [0, 9, 18, 27, 36]
    rest = cut.part(slice(3, None))
    assert (rest.offset == cut.offset[3:]).all()
    assert rest.doc[0] == 0


def test_a_long_text_is_tokenised_only_where_windows_are_taken(monkeypatch):
    monkeypatch.setattr(cutting, "LONG", 1000)
    monkeypatch.setattr(cutting, "PIECE", 500)
    text = Documents("one", ("d",), (" ".join(f"w{2 + i % 900}" for i in range(5000)),))
    tokenizer = Counting()
    cut = windows(text, tokenizer, seq_len=5, tokens=15)
    assert tokenizer.calls == 3
    assert len(cut) == 3
    whole = windows(text, tokenizer, seq_len=5, tokens=100_000)
    assert len(whole) > 960  # but for the ends of the pieces
    order = np.argsort(whole.offset)
    ids = whole.ids[order]
    assert (
        np.diff(ids, axis=1) % 900 == 1
    ).all()  # in a piece nothing is lost, at a border nothing is broken
    seen = (ids[:, 0] - 2) % 900
    assert (np.diff(seen) % 900 < 20).all()  # offsets are in the order of the text


def test_a_line_of_50_mb_costs_no_more_than_the_windows_taken():
    text = Documents("one", ("d",), ("w17 " * 12_500_000,))
    started = time.process_time()
    cut = windows(text, word_tokenizer(), seq_len=64, tokens=640)
    assert time.process_time() - started < 10
    assert cut.tokens == 640


@pytest.mark.parametrize("opening", ["<s> ", "<s> <s> "])
def test_a_text_that_begins_with_bos_gets_no_second_one(opening):
    plain = corpus(60)
    marked = Documents("corpus", ("d0",), (opening + plain.texts[0],))
    tokenizer = word_tokenizer("<s> $A")
    cut = windows(marked, tokenizer, seq_len=12, tokens=96)
    assert (cut.ids == windows(plain, tokenizer, seq_len=12, tokens=96).ids).all()
    assert (cut.ids[:, 1] != 0).all()


def test_the_seed_decides_the_order_and_nothing_else():
    def starts(seed: int) -> list[int]:
        docs = corpus(*[20] * 8)
        return windows(docs, word_tokenizer(), 10, 160, seed=seed).ids[:, 0].tolist()

    assert starts(0) == starts(0) != starts(1)
    assert sorted(starts(0)) == sorted(starts(1))


def test_more_tokens_begin_with_the_same_windows():
    docs = corpus(*[50] * 6)
    few, many = (windows(docs, word_tokenizer(), 10, n) for n in (70, 250))
    assert (many.ids[:7] == few.ids).all()
    assert (many.doc[:7] == few.doc).all()


def test_never_more_tokens_than_asked_for():
    assert windows(corpus(50), word_tokenizer(), seq_len=10, tokens=39).tokens == 30


@pytest.mark.parametrize(
    ("template", "prefix"),
    [(None, ()), ("$A", ()), ("<s> $A", (0,)), ("<s> $A </s>", (0,)), ("<s> <s> $A", (0, 0))],
)
def test_the_prefix_is_what_the_tokenizer_puts_there(template, prefix):
    tokenizer = word_tokenizer(template)
    assert prefix_ids(tokenizer) == prefix
    cut = windows(corpus(60, 60), tokenizer, seq_len=12, tokens=96)
    assert cut.prefix == prefix
    assert cut.ids.shape == (8, 12)
    assert (cut.ids[:, : len(prefix)] == np.array(prefix, dtype=int)).all()
    assert (np.diff(cut.ids[:, len(prefix) :], axis=1) == 1).all()
    # The text goes on where the last window of the document ended: the prefix costs no text.
    body = 12 - len(prefix)
    first = np.sort(cut.ids[cut.doc == 0, len(prefix)])
    assert (np.diff(first) % body == 0).all()


def test_a_bos_that_is_named_and_not_added_is_not_added_here(toy):
    assert toy.tokenizer.bos_token == "<bos>"
    assert prefix_ids(toy.tokenizer) == ()


class Counting:
    """Counts the texts that are tokenised."""

    def __init__(self) -> None:
        self.calls = 0
        self.real = word_tokenizer()

    def __call__(self, text: str, **options: object) -> object:
        self.calls += text != "a b"  # not the probe for the prefix
        return self.real(text, **options)


def test_only_what_is_needed_is_tokenised():
    tokenizer = Counting()
    windows(corpus(*[50] * 8), tokenizer, seq_len=10, tokens=30)
    assert tokenizer.calls == 3
    tokenizer = Counting()
    windows(corpus(*[50] * 8), tokenizer, seq_len=10, tokens=200)
    assert tokenizer.calls == 8  # once each, though each gives several windows


def test_batches_cover_all_windows_in_order():
    cut = windows(corpus(70), word_tokenizer(), seq_len=10, tokens=70)
    parts = list(cut.batches(3))
    assert [len(p.ids) for p in parts] == [3, 3, 1]
    assert (np.concatenate([p.ids for p in parts]) == cut.ids).all()
    assert (np.concatenate([p.doc for p in parts]) == cut.doc).all()


def test_the_fingerprint_names_ids_and_documents():
    a = windows(corpus(30, 30), word_tokenizer(), seq_len=10, tokens=60)
    assert a.fingerprint == windows(corpus(30, 30), word_tokenizer(), 10, 60).fingerprint
    assert a.fingerprint != windows(corpus(30, 30), word_tokenizer(), 10, 50).fingerprint
    assert a.fingerprint != windows(corpus(30, 30), word_tokenizer(), 15, 60).fingerprint


@pytest.mark.parametrize(
    ("seq_len", "tokens", "match", "hint"),
    [
        (64, 0, "--tokens 0 is less than one window of --seq-len 64", "--tokens 64 or more"),
        (64, 63, "--tokens 63 is less than one window", "smaller --seq-len"),
        (64, 640, "the longest has 30 tokens", "--seq-len 30 or less"),
        (1, 100, "--seq-len 1 leaves no room for text", "2 or more"),
        (0, 100, "--seq-len 0 leaves no room for text", "2 or more"),
    ],
)
def test_errors(seq_len, tokens, match, hint):
    with pytest.raises(DataError, match=match) as error:
        windows(corpus(30, 8), word_tokenizer(), seq_len, tokens)
    assert hint in error.value.hint


def test_a_tokenizer_that_rewrites_the_text_is_refused():
    class Odd:
        def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> object:
            return type("Out", (), {"input_ids": [9, 8] if add_special_tokens else [5, 6]})

    with pytest.raises(DataError, match=r"\[5, 6\] became \[9, 8\]"):
        prefix_ids(Odd())
