"""Gates between a layer's own module and its replacement: what answers need stays open, on planted layers."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planted import RETRIEVAL, TEXT, config, planted_layers, prompts, swept
from wonderland import documents

import mismatch
from mismatch.stages.plan import answers, gates
from mismatch.surgery.operate import replace


@pytest.fixture(scope="module")
def planted(tiny):
    return planted_layers(tiny)


def test_gates_stay_open_where_answers_need_them(planted, monkeypatch):
    monkeypatch.setattr(gates, "PRICE", 0.002)  # the planted answer is worth little
    settings = config(score="gates")
    every, sweep = swept(planted, settings)
    before = [weight.clone() for weight in planted.model.parameters()]
    stood = gates.learnt(sweep, every, [prompts(planted)], 96)
    assert stood.shape == (2, 3)
    for half in stood:
        assert half[RETRIEVAL] > 0.5
        assert half[TEXT] == half[1] < 0.2
    assert all(torch.equal(a, b) for a, b in zip(before, planted.model.parameters(), strict=True))


def test_no_gate_stays_open_for_what_changes_nothing(planted):
    settings = config(mechanism="identity", score="gates")
    every, sweep = swept(planted, settings)
    stood = gates.learnt(sweep, every, [prompts(planted)], 96)
    assert (stood == stood[0, 0]).all() and stood[0, 0] < 0.2


def test_a_gate_beside_nothing_scales_the_attention(planted):
    """Half open beside `zero`, the model is the one whose output projections are halved."""
    settings = config(score="gates")
    every, sweep = swept(planted, settings)
    replace(sweep.base, [p for cell in every for p in cell.placements])
    sweep.base.plan = SimpleNamespace(clauses=[SimpleNamespace(layer=at) for at in range(3)])
    shares = torch.tensor([1.0, 0.5, 0.25], requires_grad=True)
    task = prompts(planted)
    with gates.mixed(sweep.base, shares, {0: 0, 1: 1, 2: 2}):
        found = gates.misaligned(sweep, task.ids, task.asked)
    found.backward()

    def wanted(values):
        model = copy.deepcopy(planted.model)
        for layer, share in zip(model.model.layers, values, strict=True):
            layer.self_attn.o_proj.weight.data *= share
        ids, asked = torch.from_numpy(task.ids), torch.from_numpy(task.asked)
        with torch.no_grad():
            p, q = (m(ids).logits[asked].log_softmax(-1) for m in (planted.model, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert found.item() == pytest.approx(wanted([1.0, 0.5, 0.25]), abs=2e-7)
    slope = (wanted([1.0, 0.5, 0.27]) - wanted([1.0, 0.5, 0.23])) / 0.04
    assert shares.grad[2].item() == pytest.approx(slope, rel=0.02)


def test_halves_share_no_prompt(planted):
    task = prompts(planted, rows=7)
    parts = [np.concatenate([ids for ids, _ in half]) for half in gates.halves([task], 40)]
    assert [len(part) for part in parts] == [4, 3]
    assert np.array_equal(parts[0], task.ids[::2]) and np.array_equal(parts[1], task.ids[1::2])


def test_a_plan_by_gates(toy, monkeypatch):
    """As if the toy could find its passkeys; a few steps, so all stand open about alike."""
    monkeypatch.setattr(answers, "check", lambda *given: ("passkey",))
    monkeypatch.setattr(gates, "STEPS", 4)
    asked = {
        "data": documents(8), "calibration_data": documents(3, seed=1), "tokens": 256, "selection_tokens": 256,
        "seq_len": 64, "length": 120, "layers": 2, "score": "gates",
    }  # fmt: skip
    made = mismatch.plan((toy.model, toy.tokenizer), "infini(segment=16)", samples=3, **asked)
    prices = {s.layer: s.cost for s in made.plan.scores}
    assert all(0.9 < price <= 1 for price in prices.values())
    assert set(made.plan.choice["infini(segment=16)"]) == set(sorted(prices, key=prices.get)[:2])
    words = made.words()
    assert "beside one another, learnt from either half of the prompts: share" in words
    assert "how sure the choice is" not in words
