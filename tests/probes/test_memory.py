"""Branches, gates and state: contributions add up, interventions end, planted memories are read rightly."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from asking import readings, setting, student, subjects
from random_models import build
from torch.nn import functional as F

from mismatch.mechanisms.base import Mechanism
from mismatch.models.layout import Layout
from mismatch.probes.base import Subject
from mismatch.probes.forced import entering, update
from mismatch.probes.memory import Memory, _heads, _slopes, contributions, intervened, mechanisms
from mismatch.registry import mechanisms as registered

BRANCHED = {
    "infini": "layer1:infini(segment=16)",
    "linear_attention": "layer1:linear_attention(window=8)",
}
"""A swap for each mechanism that names branches."""


def parts(swap):
    model = build("llama")
    made = student(model, swap)
    ids = torch.randint(3, 101, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stream = entering(Layout.of(model), ids, [1])[1]
    subject = Subject.of(made)
    return subject, ids, stream, mechanisms(subject)[1][0]


def test_every_mechanism_with_branches_is_in_the_list():
    named = {n for n in registered().names() if registered().card(n).facts.get("branch_names")}
    assert named == set(BRANCHED)


@pytest.mark.parametrize("swap", BRANCHED.values())
def test_what_branches_take_away_adds_up_to_the_whole(swap):
    subject, ids, stream, mechanism = parts(swap)
    with torch.no_grad():
        taken = contributions(subject, 1, ids, stream, mechanism)
        whole = _heads(subject, 1, ids, stream, mechanism)
    assert set(taken) == set(mechanism.branch_names)
    assert torch.allclose(sum(taken.values()), whole, atol=1e-5)
    assert all(x.abs().max() > 0 for x in taken.values())


@pytest.mark.parametrize("swap", BRANCHED.values())
def test_without_all_branches_nothing_is_added(swap):
    subject, ids, stream, mechanism = parts(swap)
    before = _heads(subject, 1, ids, stream, mechanism)
    outs = mechanism.branches()
    with torch.no_grad(), ExitStack() as stack:
        for out in outs.values():
            stack.enter_context(out)
        assert (_heads(subject, 1, ids, stream, mechanism) == 0).all()
    assert mechanism.silent == frozenset()
    assert torch.equal(_heads(subject, 1, ids, stream, mechanism), before)


def test_an_intervention_ends_after_an_error():
    *_, mechanism = parts(BRANCHED["infini"])
    for case in (("without", "memory"), ("with", "first_token")):
        settings = mechanism.settings
        with pytest.raises(ZeroDivisionError), intervened([mechanism], case):
            raise ZeroDivisionError
        assert mechanism.silent == frozenset() and mechanism.settings == settings


def test_the_first_token_given_back_is_one_sink():
    model = build("llama")
    plain, sunk = (student(model, f"layer1:infini(segment=16, sinks={n})") for n in (0, 1))
    ids = torch.randint(3, 101, (2, 50), generator=torch.Generator().manual_seed(0))
    mechanism = mechanisms(Subject.of(plain))[1][0]
    with torch.no_grad():
        wanted = sunk.model(input_ids=ids, use_cache=False).logits
        with intervened([mechanism], ("with", "first_token")):
            assert torch.equal(plain.model(input_ids=ids, use_cache=False).logits, wanted)
        assert not torch.equal(plain.model(input_ids=ids, use_cache=False).logits, wanted)
    assert mechanisms(Subject.of(sunk))[1][0].restores() == {}


def test_output_readings_are_those_of_whole_forwards():
    model = build("llama")
    made = student(model, "layer1:infini(segment=16)")
    probe = Memory(setting())
    answers = probe.run([subjects(model, "layer1:nope")[0], Subject.of(made)])
    got, ids = readings(answers), torch.from_numpy(probe.ids)
    mechanism = mechanisms(Subject.of(made))[1][0]
    with torch.no_grad():
        p = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)[:, 16:-1]
        for case in (None, ("without", "memory"), ("with", "first_token")):
            stat = "" if case is None else "[{}={}]".format(*case)
            with intervened([mechanism], case):
                q = made.model(input_ids=ids, use_cache=False).logits.double()
            q = q.log_softmax(-1)[:, 16:-1]
            wanted = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
            assert got[f"kl{stat}"].value() == pytest.approx(float(wanted), rel=1e-4, abs=1e-7)
            if case is not None:
                change = got[f"kl{stat}"].value() - got["kl"].value()
                assert got[f"kl_change{stat}"].value() == pytest.approx(change, rel=1e-9, abs=1e-12)
            nll = -q.gather(-1, ids[:, 17:, None]).mean()
            assert got[f"nll{stat}"].value() == pytest.approx(float(nll), abs=1e-5)
    assert readings(answers, "teacher")["kl"].value() == 0


def test_a_memory_that_nobody_reads():
    answers = Memory(setting()).run(
        subjects(build("llama"), "layer1:infini(segment=16, gate_init=-200)")
    )
    got = readings(answers)
    assert got["kl[without=memory]"].value() == got["kl"].value() > 0
    for head in range(4):
        assert got["share[branch=memory]", 1, head].value() == 0
        assert got["share[branch=local]", 1, head].value() == 1
        assert got["gate[branch=memory]", 1, head].value() == pytest.approx(0, abs=1e-30)


def test_a_memory_that_answers_everybody_alike():
    """All values equal: the reading is a convex mean of them, so the query cannot matter."""
    model = build("llama")
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.v_proj.weight.zero_()
        attention.v_proj.bias = torch.nn.Parameter(torch.randn(16))
    got = readings(Memory(setting()).run(subjects(model, "layer1:infini(segment=16)")))
    for head in range(4):
        assert got["query_variation[branch=memory]", 1, head].value() < 1e-5
        assert got["share[branch=memory]", 1, head].value() == pytest.approx(0.5, abs=1e-5)


def test_query_variation_by_hand():
    subject, ids, stream, mechanism = parts("layer1:infini(segment=16)")
    probe = Memory(setting(text=ids.numpy(), docs=np.arange(2), samples=2))
    got = readings(
        {
            "swap": list(
                probe._layer(
                    Subject.teacher(Layout.of(build("llama"))), subject, 1, [mechanism], 16
                )
            )
        }
    )
    with torch.no_grad():
        taken = contributions(subject, 1, ids, stream, mechanism)["memory"]
    for head in range(4):
        rows = []
        for row in taken[:, head]:
            apart = length = 0.0
            segments = [row[s : s + 16] for s in range(16, 70, 16)]
            for segment in segments:
                centred = segment - segment.mean(0)
                apart += float(centred.norm(dim=1).mean()) / len(segments)
                length += float(segment.norm(dim=1).mean()) / len(segments)
            rows.append(apart / length)
        value = got["query_variation[branch=memory]", 1, head].value()
        assert value == pytest.approx(np.mean(rows), rel=1e-6)


def test_gate_gradients_by_finite_differences():
    subject, ids, stream, mechanism = parts("layer1:infini(segment=16)")
    teacher = Subject.teacher(Layout.of(build("llama")))
    with torch.no_grad():
        target = update(teacher, 1, ids, stream)
    got = _slopes(subject, 1, ids, stream, target, [mechanism], 16)
    assert got.shape == (2, 2)
    step, losses = 1e-2, {}
    with torch.no_grad():
        for sign in (1, -1):
            mechanism.gate += sign * step
            made = update(subject, 1, ids, stream).double()
            mechanism.gate -= sign * step
            error = (made - target).square().sum(-1) / target.double().square().sum((1, 2))[:, None]
            losses[sign] = torch.stack([error[:, :16].sum(1), error[:, 16:].sum(1)], -1)
    slope = (losses[1] - losses[-1]) / (2 * step) / 4  # mean over 4 heads
    np.testing.assert_allclose(got, slope.numpy(), rtol=2e-2, atol=1e-5)
    assert mechanism.gate.requires_grad and mechanism.gate.grad is None


def test_the_first_segment_pulls_only_where_the_memory_is_blended_in():
    """With first_segment=local no gate acts while the memory is empty."""
    for kind, moved in (("blend", True), ("local", False)):
        swap = f"layer1:infini(segment=16, first_segment={kind})"
        got = readings(Memory(setting()).run(subjects(build("llama"), swap)))
        assert (got["gate_gradient[part=first]", 1, None].value() != 0) == moved
        assert got["gate_gradient[part=rest]", 1, None].value() != 0


def test_state_grows_with_the_text_and_its_horizon():
    """Keys of 0 make sigma(k) = 1: z is the number of tokens in closed segments, exactly."""
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.zero_()
    got = readings(Memory(setting()).run(subjects(model, "layer1:infini(segment=16)")))
    assert got["state_max[tensor=norm]", 1, None].value() == 80
    assert got["overflow_fp16[tensor=norm]", 1, None].value() == pytest.approx(65504)


def test_travel_and_its_warning():
    asked = subjects(build("llama"), "layer1:infini(segment=16)")
    for travel, warned in ((0.05, True), (5.0, False), (None, False)):
        probe = Memory(setting(travel=travel))
        got = readings(probe.run(asked))
        assert ("travel" in got) == (travel is not None)
        assert any("sum up to 0.05; below 4" in text for text in probe.warnings()) == warned


def test_under_a_shared_denominator_there_is_no_gate_and_the_share_is_read():
    text = "layer1:infini(segment=16, overlap=1, normalizer=shared, feature_map=hedgehog, sinks=1)"
    answers = Memory(setting()).run(subjects(build("llama"), text))
    mine = answers["swap"]
    (gate,) = [m for m in mine if m.stat.startswith("gate")]
    assert gate.stat == "gate"
    assert np.isnan(gate.value())
    shares = [m.value() for m in mine if m.stat.startswith("share[branch=memory]")]
    assert len(shares) == 4
    assert all(0 < share < 1 for share in shares)
    carried = {m.stat for m in mine if m.stat.startswith("state_max")}
    assert carried == {"state_max[tensor=memory]", "state_max[tensor=norm]"}


def test_what_has_no_branches_is_not_applicable():
    answers = Memory(setting()).run(subjects(build("llama"), "layer1:nope", ("zero",)))
    for name in ("teacher", "swap", "zero"):
        got = readings(answers, name)
        assert got["share", 1, None].n == 0
        assert got["kl"].n > 0
    assert not [key for key in readings(answers) if "without" in str(key)]


def test_a_window_of_one_segment_says_so():
    probe = Memory(setting())
    answers = probe.run(subjects(build("llama"), "layer1:infini(segment=200)"))
    assert readings(answers)["kl"].n == 0
    assert probe.warnings() == (
        "memory: one segment of 200 tokens holds the whole window of 80; take --seq-len 400 or more",
    )


def test_an_inner_mechanism_is_found():
    made = student(build("llama"), "layer1:parallel(infini(segment=16), alpha=0.5)")
    found = mechanisms(Subject.of(made))
    assert [type(m).__name__ for m in found[1]] == ["Infini"] and isinstance(found[1][0], Mechanism)


def test_of_some_heads_only_those_are_read():
    """As of a whole layer: on the teacher's stream a head does not know of the others."""
    model = build("llama")
    whole = readings(Memory(setting()).run(subjects(model, "layer1:infini(segment=16)")))
    text = "layer1.heads[0,1]:infini(segment=16); layer1.heads[3]:infini(segment=16, sinks=1)"
    probe = Memory(setting())
    got = readings(probe.run(subjects(model, text)))
    for stat in ("share[branch=memory]", "query_variation[branch=local]", "gate[branch=memory]"):
        heads = {key[2] for key in got if key[0] == stat}
        assert heads == {0, 1, 3}
        for head in (0, 1):
            assert got[stat, 1, head].value() == pytest.approx(whole[stat, 1, head].value(), 1e-5)
    assert got["kl_change[without=memory]"].value() != 0
    subject = Subject.of(student(model, text))
    found = mechanisms(subject)[1]
    assert [m.used_heads for m in found] == [(0, 1), (3,)]
