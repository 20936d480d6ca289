"""Shared prefixes and heads on a few positions give the numbers of plain, whole forwards."""

from __future__ import annotations

import pytest
import torch
from asking import log_softmax, setting, student, subjects
from random_models import build

from mismatch.errors import NumericsError
from mismatch.forward.head import log_probs, scores
from mismatch.forward.shared_prefix import finals
from mismatch.metrics.sums.logits import kl_float64
from mismatch.probes.base import Subject
from mismatch.probes.induction import Induction
from mismatch.probes.passkey import Passkey

SWAPS = (
    "layer2:nope",
    "layer1:infini(segment=8)",
    "layer0.mlp:zero",
    "layer1.block:skip",
    "final_norm:zero",
)


def batch(rows=3, length=20, seed=0):
    return torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("swap", SWAPS)
def test_final_states_are_those_of_whole_forwards(swap):
    model = build("llama")
    made = student(model, swap)
    teacher, other = subjects(model, swap)
    with torch.no_grad():
        got = {s.name: final for s, final in finals([teacher, other], batch())}
        for name, whole in (("teacher", model), ("swap", made.model)):
            wanted = whole.base_model(input_ids=batch(), use_cache=False).last_hidden_state
            assert torch.equal(got[name], wanted), name


def test_scores(family):
    model = build(family)
    ids, scored = batch(), torch.zeros(3, 20, dtype=torch.bool)
    scored[0, 1] = scored[1, [5, 19]] = scored[2, 7] = True
    subject = subjects(model, "layer1.attn:identity")[0]
    with torch.no_grad():
        (_, final), *_ = finals([subject], ids)
        value, right = scores(subject.layout, final, ids, scored)
    plain = log_softmax(model, ids)
    for row, at in scored.nonzero().tolist():
        wanted = plain[row, at - 1]
        assert float(value[row, at]) == pytest.approx(float(wanted[ids[row, at]]), abs=1e-5)
        assert bool(right[row, at]) == (int(wanted.argmax()) == int(ids[row, at]))
    assert (value[~scored] == 0).all() and right[~scored].all()


def test_kl_is_that_of_torch():
    p, q = (torch.randn(5, 31, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    wanted = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(kl_float64(p, q), wanted, rtol=1e-10)
    assert (kl_float64(p, p) == 0).all()


def test_infinity_is_named():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(
        NumericsError, match=r"(NaN|infinity) in the teacher's activations: final states"
    ):
        list(finals(subjects(model, "layer1:nope")[:1], batch()))


@pytest.mark.parametrize("swap", ["layer1:nope", "layer1:infini(segment=8)"])
def test_induction_is_the_nll_of_a_plain_forward(swap):
    model = build("llama")
    made = student(model, swap)
    probe = Induction(setting())
    answers = probe.run([Subject.teacher(subjects(model, swap)[0].layout), Subject.of(made)])
    ids = torch.from_numpy(probe.ids)
    for name, whole in (("teacher", model), ("swap", made.model)):
        plain = log_softmax(whole, ids)[:, :-1]
        nll = -plain.gather(-1, ids[:, 1:, None])[..., 0]
        got = {m.stat: m.value() for m in answers[name]}
        # Token 0 opens; of each copy the first token is left out.
        first, second = nll[:, 1 : probe.half], nll[:, probe.half + 1 :]
        assert first.shape == second.shape == (4, probe.half - 1)
        assert got["nll_first"] == pytest.approx(float(first.mean()), abs=1e-5)
        assert got["nll_second"] == pytest.approx(float(second.mean()), abs=1e-5)
        assert got["gain"] == pytest.approx(float((first - second).mean()), abs=1e-5)
        right = plain.argmax(-1) == ids[:, 1:]
        assert got["top1_second"] == pytest.approx(
            float(right[:, probe.half + 1 :].double().mean())
        )


def test_an_untrained_model_cannot_copy():
    answers = Induction(setting(samples=16)).run(subjects(build("llama"), "layer1:nope"))
    gain = next(m for m in answers["teacher"] if m.stat == "gain")
    assert abs(gain.value()) < 0.3  # nats; a model that copies gains ln(98) = 4.6


def test_passkey_is_the_log_probability_of_a_plain_forward():
    model = build("llama")
    made = student(model, "layer1:infini(segment=64)")
    probe = Passkey(setting())
    answers = probe.run([subjects(model, "layer1:nope")[0], Subject.of(made)])
    totals = {"teacher": [], "swap": []}
    for (length, depth), prompts in probe.cells.items():
        ids = torch.from_numpy(prompts.ids)
        for name, whole in (("teacher", model), ("swap", made.model)):
            plain = log_softmax(whole, ids)[:, -6:-1]  # what predicts the five digits
            picked = plain.gather(-1, ids[:, -5:, None])[..., 0]
            exact = (plain.argmax(-1) == ids[:, -5:]).all(1)
            got = {m.stat: m for m in answers[name]}
            cell = f"[length={length},depth={depth:g}]"
            assert got[f"logprob{cell}"].value() == pytest.approx(
                float(picked.sum(1).mean()), abs=1e-4
            )
            assert got[f"exact{cell}"].value() == float(exact.double().mean())
            assert got[f"logprob{cell}"].position == "{}-{}".format(*prompts.needle)
            totals[name].append(float(picked.sum(1).mean()))
    for name, values in totals.items():
        got = {m.stat: m.value() for m in answers[name]}
        assert got["logprob"] == pytest.approx(sum(values) / len(values), abs=1e-4)
        # Without training it is the same whether the key stands in the text or not.
        assert got["logprob_absent"] == pytest.approx(got["logprob"], abs=4.0)
        crossed = {p.borders(64): v for p, v in zip(probe.cells.values(), values, strict=True)}
        for count, value in crossed.items():
            assert got[f"logprob[segments={count}]"] == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize(
    ("swap", "segment"),
    [
        ("layer1:infini(segment=32)", 32),
        ("layer1:infini", 256),
        ("layer1:parallel(infini(segment=32), alpha=0.1)", 32),
        ("layer1:infini(segment=32); layer2:infini(segment=16)", None),
        ("layer1:nope", None),
    ],
)
def test_segments_are_those_of_the_mechanism_wherever_it_is(swap, segment):
    assert Subject.of(student(build("llama"), swap)).segment == segment


def test_log_probs_are_those_of_the_model(family):
    model = build(family)
    subject = subjects(model, "layer1.attn:identity")[0]
    with torch.no_grad():
        (_, final), *_ = finals([subject], batch())
        got = log_probs(subject.layout, final)
    assert torch.allclose(got.double(), log_softmax(model, batch()), atol=1e-5)
