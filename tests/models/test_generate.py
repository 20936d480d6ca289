"""`mismatch generate`: what is said is the model's, repeats, and is refused in time."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch

import mismatch
from mismatch import cli
from mismatch.errors import UsageError
from mismatch.models import generate as generating

PROMPT = "Once upon a time"


def test_greedy_is_transformers_greedy(toy):
    made = mismatch.generate(toy[:2], PROMPT, max_new_tokens=20)
    ids = toy.tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(20):
            ids = torch.cat([ids, toy.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert made.text == toy.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert made.text.startswith(PROMPT)
    assert (made.tokens, made.ended) == (20, False)


def test_greedy_is_greedy_whatever_the_model_would_do(toy):
    model = copy.deepcopy(toy.model)
    model.generation_config.update(do_sample=True, temperature=2.0, repetition_penalty=9.0)
    wanted = mismatch.generate(toy[:2], PROMPT, max_new_tokens=20)
    assert mismatch.generate((model, toy.tokenizer), PROMPT, max_new_tokens=20) == wanted


def test_draws_repeat_by_seed_and_leave_the_callers_alone(toy):
    def say(seed, temperature=1.0):
        return mismatch.generate(
            toy[:2], PROMPT, max_new_tokens=20, temperature=temperature, seed=seed
        ).text

    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert say(0) == say(0) != say(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert say(0, temperature=1e-4) == say(1, temperature=1e-4) == say(0, temperature=0)


def test_draws_are_from_the_whole_distribution(toy):
    """First tokens drawn at temperature 1 come as often as the model says, whatever its own settings are."""
    model = copy.deepcopy(toy.model)
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1)
    ids = toy.tokenizer(PROMPT, return_tensors="pt").input_ids
    wanted = model(ids).logits[0, -1].softmax(-1)
    drawn = torch.zeros_like(wanted)
    encoded = {"input_ids": ids.expand(4000, -1), "attention_mask": torch.ones(4000, ids.shape[1])}
    torch.manual_seed(0)
    out = generating.run(model, encoded, max_new_tokens=1, temperature=1.0)[:, -1]
    assert model.generation_config.top_p == 0.1
    drawn.index_add_(0, out, torch.ones(4000))
    top = wanted.topk(8).indices
    # Four standard deviations of a share of 4000 draws.
    bound = 4 * (wanted[top] * (1 - wanted[top]) / 4000).sqrt()
    assert ((drawn[top] / 4000 - wanted[top]).abs() <= bound).all()


def test_it_ends_where_the_model_ends(toy):
    model = copy.deepcopy(toy.model)
    ids = toy.tokenizer(PROMPT, return_tensors="pt").input_ids
    model.generation_config.eos_token_id = [0, int(model(ids).logits[0, -1].argmax())]
    made = mismatch.generate((model, toy.tokenizer), PROMPT)
    assert (made.tokens, made.ended) == (1, True)


def test_a_chat_gives_the_answer_alone(toy):
    tokenizer = copy.deepcopy(toy.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}"
    made = mismatch.generate((toy.model, tokenizer), "who is it", chat=True, max_new_tokens=9)
    plain = mismatch.generate(toy[:2], "Q: who is it\nA:", max_new_tokens=9)
    assert plain.text == "Q: who is it\nA:" + made.text


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        (PROMPT, {"max_new_tokens": 0}, "--max-new-tokens must be 1 or more, got 0"),
        (
            PROMPT,
            {"temperature": -0.5},
            "--temperature must be 0 or more, got -0.5\n\nhint: 0 takes the likeliest token each time",
        ),
        (PROMPT, {"temperature": float("nan")}, "--temperature must be 0 or more, got nan"),
        (
            "",
            {},
            "the prompt is empty, and this model has no token that begins a text\n\n"
            'hint: give some words, such as "Once upon a time"',
        ),
        (
            PROMPT,
            {"chat": True},
            "--chat: this model's tokenizer has no chat template\n\nhint: leave --chat out",
        ),
        (
            "a",
            {"max_new_tokens": 128},
            "a prompt of 1 tokens and 128 new ones are longer than the context of this model: 128 tokens\n\n"
            "hint: take --max-new-tokens 127 or less",
        ),
        ("a b " * 99, {}, "128 tokens\n\nhint: take a shorter prompt"),
    ],
)
def test_refused(toy, prompt, options, text):
    with pytest.raises(UsageError) as caught:
        mismatch.generate(toy[:2], prompt, **options)
    assert text in str(caught.value)


def test_wrong_numbers_are_refused_before_the_model_is_loaded():
    with pytest.raises(UsageError, match="--max-new-tokens"):
        mismatch.generate("no_such_model", PROMPT, max_new_tokens=0)


def test_students_and_checkpoints_speak_alike(swapped_toy, saved_toy):
    made = mismatch.generate(swapped_toy, PROMPT)
    assert mismatch.generate(saved_toy, PROMPT) == made
    assert mismatch.generate(mismatch.load(saved_toy), PROMPT) == made


def test_the_command(saved_toy, swapped_toy, capsys):
    words = ["generate", str(saved_toy), PROMPT, "--max_new_tokens", "9"]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    made = mismatch.generate(swapped_toy, PROMPT, max_new_tokens=9)
    assert (out, err) == (made.text + "\n", "")
    assert cli.main([*words, "--json", "--temperature", "0.5", "--seed", "3"]) == 0
    drawn = mismatch.generate(swapped_toy, PROMPT, max_new_tokens=9, temperature=0.5, seed=3)
    assert json.loads(capsys.readouterr().out) == {
        "model": str(saved_toy),
        "prompt": PROMPT,
        "text": drawn.text,
        "tokens": drawn.tokens,
        "ended": drawn.ended,
    }
    assert cli.main(["generate", "glassllm", PROMPT, "--max-new-tokens", "9"]) == 0
    plain = mismatch.generate("glassllm", PROMPT, max_new_tokens=9)
    assert capsys.readouterr().out == plain.text + "\n" != made.text + "\n"
    assert cli.main([*words, "--dtype", "int3"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown dtype 'int3'; known: ")
    assert cli.main(["generate", str(saved_toy), PROMPT, "--max-new-tokens", "x"]) == 2
    assert "invalid int value: 'x'" in capsys.readouterr().err


def test_the_command_line_imports_no_torch(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mismatch.api", None)
    assert cli.main(["generate", "--help"]) == 0
    assert "Once upon a time" in capsys.readouterr().out
