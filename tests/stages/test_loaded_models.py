"""Models that the caller loaded: what is taken, what is said of the rest, and that they are his again afterwards."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers
from wonderland import documents

import mismatch
from mismatch.errors import ModelError, NumericsError, UsageError

TEXTS = documents(4)
SMALL = {"data": TEXTS, "tokens": 256, "seq_len": 64, "batch_size": 2}
TRACE = {**SMALL, "controls": ()}


def kl(result):
    t = result.table
    t = t[(t["metric"] == "kl") & (t["site"] == "logits") & (t["position"] == "all")]
    return float(t[(t["student"] == "swap") & (t["stat"] == "mean")]["value"].item())


def left_behind(model):
    """Names of modules with a hook or a forward of their own."""
    return [
        name
        for name, module in model.named_modules()
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    ]


def numbers(result):
    return result.table.drop(columns="run_id")


# ---- what is not a model with its tokenizer -------------------------------------------------------


def bare(model):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(model.config)


def tuples(model):
    model = copy.deepcopy(model)
    model.config.return_dict = False
    return model


def small(model):
    model = copy.deepcopy(model)
    model.resize_token_embeddings(20)
    return model


GIVEN = "a loaded model is given as (model, tokenizer), got ("
TOKENIZER = "the model is a transformers model, the tokenizer the one it was trained with"
WRONG = {
    "a model alone": (
        lambda model, tokenizer: model,
        UsageError,
        "a model is given as a name, a folder, or (model, tokenizer), got LlamaForCausalLM",
        "pass (model, tokenizer), both as transformers loads them",
    ),
    "a student": (
        lambda model, tokenizer: mismatch.swap((model, tokenizer), "layer2:zero"),
        UsageError,
        "a model is given as a name, a folder, or (model, tokenizer), got a student",
        "pass (student.model, student.tokenizer)",
    ),
    "the other way round": (
        lambda model, tokenizer: (tokenizer, model),
        UsageError,
        f"{GIVEN}TokenizersBackend, LlamaForCausalLM)",
        TOKENIZER,
    ),
    "two models": (
        lambda model, tokenizer: (model, model),
        UsageError,
        f"{GIVEN}LlamaForCausalLM, LlamaForCausalLM)",
        TOKENIZER,
    ),
    "nothing": (lambda model, tokenizer: None, UsageError, "got NoneType", "both as transformers"),
    "without weights": (
        lambda model, tokenizer: (bare(model), tokenizer),
        ModelError,
        "the model that was handed over has tensors without values",
        "from_pretrained",
    ),
    "tuples": (
        lambda model, tokenizer: (tuples(model), tokenizer),
        ModelError,
        "the model that was handed over returns tuples",
        "model.config.return_dict = True",
    ),
    "too many tokens": (
        lambda model, tokenizer: (small(model), tokenizer),
        ModelError,
        "the model that was handed over: the tokenizer has 1,024 tokens, the embedding 20 rows",
        "model.resize_token_embeddings(len(tokenizer))",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_a_model_with_its_tokenizer_is_told_what_to_pass(toy, what):
    make, kind, said, hint = WRONG[what]
    given = make(*toy[:2])
    for call in (
        mismatch.load,
        lambda model: mismatch.trace(model, "layer2:zero", **TRACE),
        lambda model: mismatch.swap(model, "layer2:zero"),
    ):
        with pytest.raises(kind) as error:
            call(given)
        assert said in error.value.message
        assert hint in error.value.hint


def test_without_a_tokenizer_what_reads_text_says_so(toy):
    bare = (toy.model, None)
    assert mismatch.swap(bare, "layer2:zero").plan.layers == (2,)
    for call in (
        lambda: mismatch.trace(bare, "layer2:zero", **TRACE),
        lambda: mismatch.probe(bare, "layer2:zero", probes=("passkey",), seq_len=128),
        lambda: mismatch.swap(bare, "layer2:mean", calibration_data=TEXTS),
        lambda: mismatch.generate(bare, "The king"),
    ):
        with pytest.raises(UsageError, match="handed over without its tokenizer") as error:
            call()
        assert error.value.hint.startswith("pass (model, tokenizer)")


def test_a_list_of_two_is_a_pair(toy):
    assert mismatch.load(list(toy[:2])).model is toy.model


# ---- modes ----------------------------------------------------------------------------------------


@pytest.fixture
def dropping(tiny, toy):
    """A GPT-2 with dropout in train mode, but for one norm that its owner froze."""
    model = tiny("gpt2", vocab_size=len(toy.tokenizer))
    assert model.config.attn_pdrop > 0
    model.train()
    model.transformer.h[1].ln_1.eval()
    return model


STAGES = {
    "trace": lambda teacher, swap: mismatch.trace(teacher, swap, **TRACE),
    "probe": lambda teacher, swap: mismatch.probe(
        teacher, swap, probes=("induction",), samples=2, seq_len=64
    ),
    "scan": lambda teacher, _: mismatch.scan(
        teacher, "zero", among="1", controls=(), tasks=["text"], **SMALL
    ),
    "generate": lambda teacher, _: mismatch.generate(teacher, "The king", max_new_tokens=4),
}


@pytest.mark.parametrize("stage", STAGES)
def test_dropout_is_off_for_the_call_and_the_mode_is_the_callers_again(dropping, toy, stage):
    run = STAGES[stage]
    evaluating = copy.deepcopy(dropping).eval()
    modes = [module.training for module in dropping.modules()]
    found = run((dropping, toy.tokenizer), "layer1:infini(segment=16)")
    assert [module.training for module in dropping.modules()] == modes
    wanted = run((evaluating, toy.tokenizer), "layer1:infini(segment=16)")
    if stage == "generate":
        assert found.text == wanted.text
    else:
        assert numbers(found).equals(numbers(wanted))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_student_in_train_mode_reads_as_in_eval_mode(tiny, toy, family):
    more = {} if family == "gpt2" else {"attention_dropout": 0.1}
    model = tiny(family, vocab_size=len(toy.tokenizer), **more)
    teacher = mismatch.load((model, toy.tokenizer))
    student = mismatch.swap(teacher, "layer1.mlp:zero")
    wanted = numbers(mismatch.trace(teacher, student, **TRACE))
    student.model.train()
    for _ in range(2):
        assert numbers(mismatch.trace(teacher, student, **TRACE)).equals(wanted)
    assert all(module.training for module in student.model.modules())
    assert not any(module.training for module in model.modules())


def test_inside_inference_mode(toy):
    wanted = numbers(mismatch.trace(toy[:2], "layer2:infini(segment=16)", **TRACE))
    with torch.inference_mode():
        mine = copy.deepcopy(toy.model)
        for model in (toy.model, mine):
            found = mismatch.trace((model, toy.tokenizer), "layer2:infini(segment=16)", **TRACE)
            assert numbers(found).equals(wanted)
        student = mismatch.swap(toy[:2], "layer2:infini(segment=16)")
    student.model.requires_grad_(True)  # of tensors that were made in inference mode it could not
    ids = torch.arange(3, 20)[None]
    student.model(ids, labels=ids).loss.backward()
    found = mismatch.trace((mine, toy.tokenizer), "layer2:infini(segment=16)", **TRACE)
    assert numbers(found).equals(wanted)


# ---- several at a time, and what is left ----------------------------------------------------------


def test_threads_on_one_teacher_read_what_they_read_alone(toy):
    teacher = mismatch.load(toy[:2])
    swaps = ["layer2:infini(segment=16)", "layer2:zero", "layer1:nope"]
    alone = [numbers(mismatch.trace(teacher, swap, **TRACE)) for swap in swaps]
    found = {}

    def work(swap):
        found[swap] = numbers(mismatch.trace(teacher, swap, **TRACE))

    threads = [threading.Thread(target=work, args=(swap,)) for swap in swaps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for swap, wanted in zip(swaps, alone, strict=True):
        assert found[swap].equals(wanted)
    assert left_behind(toy.model) == []


def test_nothing_of_a_run_that_fails_is_left(toy):
    teacher = mismatch.load((copy.deepcopy(toy.model).train(), toy.tokenizer))
    student = mismatch.swap(teacher, "layer2:zero")
    student.model.model.layers[3].mlp.down_proj.weight.data[0, 0] = float("nan")
    before = left_behind(student.model)
    with pytest.raises(NumericsError, match="NaN in the student's"):
        mismatch.trace(teacher, student, **TRACE)
    assert left_behind(teacher.model) == []
    assert left_behind(student.model) == before
    assert teacher.model.training


# ---- students that are not the teacher in front of the swap ---------------------------------------


def test_a_trained_student_is_measured_against_a_teacher_that_did_not_move(toy):
    teacher = mismatch.load(toy[:2])
    student = mismatch.swap(teacher, "layer2:infini(segment=16)")
    student.model.requires_grad_(True)
    steps = torch.optim.AdamW(student.model.parameters(), lr=1e-3)
    ids = torch.tensor(toy.tokenizer(TEXTS[0])["input_ids"][:128])[None]
    for _ in range(3):
        student.model(ids, labels=ids).loss.backward()
        steps.step()
        steps.zero_grad()
    # Every tensor was trained, so nothing may be shared: a copy that never saw the teacher reads the same.
    found = mismatch.trace(teacher, student, **TRACE)
    other = mismatch.load((copy.deepcopy(student.model), toy.tokenizer))
    assert kl(found) == pytest.approx(kl(mismatch.trace(teacher, other, **TRACE)), rel=1e-6)
    student.undo()
    assert torch.equal(student.model(ids).logits, toy.model(ids).logits)


def test_a_student_of_a_student_against_the_first_teacher(toy):
    teacher = mismatch.load(toy[:2])
    first = mismatch.swap(teacher, "layer1:zero")
    second = mismatch.swap((first.model, toy.tokenizer), "layer2:infini(segment=16)")
    found = kl(mismatch.trace(teacher, second, **TRACE))
    both = ["layer1:zero", "layer2:infini(segment=16)"]
    assert found == kl(mismatch.trace(teacher, both, **TRACE))
    beside = kl(mismatch.trace((first.model, toy.tokenizer), second, **TRACE))
    assert found != pytest.approx(beside, rel=0.01)
