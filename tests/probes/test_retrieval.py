"""Induction and passkey give the numbers of plain, whole forwards."""

from __future__ import annotations

import pytest
import torch
from asking import log_softmax, setting, student, subjects
from random_models import build

from mismatch.probes.base import Subject
from mismatch.probes.induction import Induction
from mismatch.probes.passkey import Passkey


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
