"""Attention worked out beside the model is the attention that the model computes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from asking import readings, setting, student, subjects
from random_models import LAYERS, build

from mismatch.mechanisms.parts.calling import hidden_in
from mismatch.probes.attention import observe_all, observing
from mismatch.probes.base import Subject
from mismatch.probes.heads import SKIP, Heads
from mismatch.probes.rope_bands import RopeBands, bound


def batch(rows=2, length=30):
    return torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(1))


def test_weights_are_those_of_eager_attention(family):
    model = build(family, attn_implementation="eager")
    seen = {}
    with torch.no_grad():
        teacher = subjects(build(family), "layer1.attn:identity")[0]
        observe_all(
            [teacher], batch(), range(LAYERS), lambda _, s: seen.update({s.layer: s.weights()})
        )
        wanted = model(input_ids=batch(), use_cache=False, output_attentions=True).attentions
    # qwen3_5: a linear attention in the others has no weights.
    layers = [1] if family == "qwen3_5_text" else list(range(LAYERS))
    assert sorted(seen) == layers and len(wanted) == len(layers)
    for layer, weights in zip(layers, wanted, strict=True):
        assert torch.allclose(seen[layer], weights, atol=1e-5), layer


@pytest.mark.parametrize(
    "swap", ["layer1:nope", "layer1:sliding_window(window=7, sinks=2)", "layer1:yarn(factor=4)"]
)
def test_under_wrappers_the_weights_give_the_output(swap):
    """weights x values through the output projection is what the wrapped attention returns."""
    made = student(build("llama"), swap)
    found = {}
    attention = made.model.model.layers[1].self_attn
    hooks = [
        attention.register_forward_hook(lambda _m, _a, out: found.update(out=out[0])),
        attention.register_forward_pre_hook(
            lambda _m, args, kwargs: found.update(x=hidden_in(args, kwargs)), with_kwargs=True
        ),
    ]
    with (
        torch.no_grad(),
        observing(Subject.of(made), [1], lambda s: found.update(seen=s)) as layers,
    ):
        made.model(input_ids=batch(), use_cache=False)
        seen = found["seen"]
        _, _, v = seen.parts.qkv(found["x"])
        out = seen.parts.project(seen.weights() @ seen.parts.per_query_head(v))
    for hook in hooks:
        hook.remove()
    assert layers == {1}
    assert torch.allclose(out, found["out"], atol=1e-5)


def test_a_mechanism_without_weights_is_not_applicable():
    answers = Heads(setting()).run(subjects(build("llama"), "layer1:infini(segment=8)"))
    got = readings(answers)
    assert got["previous", 1, None].n == 0 and math.isnan(got["previous", 1, None].value())
    for layer in (0, 2):
        assert got["previous", layer, 3].n > 0
    # In front of the swap it is the teacher's own.
    assert got["induction", 0, 1].value() == readings(answers, "teacher")["induction", 0, 1].value()


def test_a_head_that_looks_everywhere_alike():
    """Queries of 0: every number has a closed form."""
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.zero_()
    probe = Heads(setting())
    got = readings(probe.run(subjects(model, "layer2.mlp:zero")), "teacher")
    length = probe.text.shape[1]
    i = np.arange(SKIP, length)
    for head in range(4):

        def read(stat, head=head):
            return got[stat, 1, head].value()

        assert read("previous") == pytest.approx(np.mean(1 / np.arange(2, length + 1)), rel=1e-5)
        assert read("sink") == pytest.approx(np.mean(1 / (i + 1)), rel=1e-5)
        assert read("entropy") == pytest.approx(np.mean(np.log(i + 1)), rel=1e-5)
        assert read("distance") == pytest.approx(np.mean((i - 1) / 2), rel=1e-5)  # over keys 1 .. i
        first = probe.twice.shape[1] - probe.half + 1
        at = np.arange(first, probe.twice.shape[1])
        assert read("induction") == pytest.approx(np.mean(1 / (at + 1)), rel=1e-5)
    masses = {k[0]: m.value() for k, m in got.items() if k[1] == 1 and k[0].startswith("mass")}
    assert sum(masses.values()) == pytest.approx(1, rel=1e-6)
    assert masses["mass[distance=0]"] == pytest.approx(np.mean(1 / i), rel=1e-5)
    assert masses["mass[distance=2]"] == pytest.approx(np.mean(2 / i), rel=1e-5)


def test_a_window_shows_in_the_distances():
    """Under a window of two, what does not stay goes to the token before."""
    answers = Heads(setting()).run(subjects(build("llama"), "layer1:sliding_window(window=2)"))
    got = readings(answers)
    for head in range(4):
        near = got["previous", 1, head].value()
        assert 0 < near < 1
        assert got["distance", 1, head].value() <= 1
    assert got["mass[distance=2]", 1, None].value() == 0
    assert readings(answers, "teacher")["mass[distance=2]", 1, None].value() > 0


def test_bands_add_up_to_the_scores(family):
    seen = {}
    with torch.no_grad():
        teacher = subjects(build(family), "layer1.attn:identity")[0]
        observe_all([teacher], batch(), [1], lambda _, s: seen.update(one=s))
    one = seen["one"]
    if one.angles is None:
        assert family == "gpt2"
        return
    pairs = len(one.angles)
    parts = [[i, i + pairs] for i in range(pairs)] + [list(range(2 * pairs, one.q.shape[-1]))]
    total = sum(one.scores(part) for part in parts)
    assert torch.allclose(total, one.scores(slice(None)), atol=1e-4)
    # The pairs are those that turn together: their length does not depend on the position.
    theta = one.parts.context.model_config.rope_parameters
    assert one.angles[0] == pytest.approx(1.0, abs=1e-6), theta


def test_frequencies_are_read_off_the_rotation():
    answers = RopeBands(setting()).run(subjects(build("llama"), "layer1:nope"))
    teacher, swap = (readings(answers, name) for name in ("teacher", "swap"))
    shares = [teacher[f"norm_share[band={b}]", 1, None].value() for b in (1, 2, 3, 4)]
    assert sum(shares) == pytest.approx(1, rel=1e-6)
    angles = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    assert teacher["bound", 1, None].value() == bound(angles)
    assert swap["bound", 1, None].n == 0  # without rotation nothing ever turns away
    for band in (1, 2, 3, 4):  # lengths do not turn: the same with and without
        stat = f"norm_share[band={band}]"
        assert swap[stat, 1, None].value() == pytest.approx(
            teacher[stat, 1, None].value(), rel=1e-5
        )
    assert swap["score_variance[band=1]", 1, None].value() != pytest.approx(
        teacher["score_variance[band=1]", 1, None].value(), rel=1e-3
    )


@pytest.mark.parametrize(
    ("base", "d", "first"), [(1e5, 64, 3616), (1e4, 128, 1707), (5e5, 128, 18438)]
)
def test_published_bounds(base, d, first):
    """SmolLM2, Llama-2, Llama-3: the last distance at which B is not negative is one less."""
    angles = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    assert bound(angles) == first
    at = torch.cos(torch.arange(first + 1)[:, None].double() * angles).sum(1)
    assert (at[:first] >= 0).all() and at[first] < 0


def test_bands_without_rope_or_weights_do_not_apply():
    for family, swap in (("gpt2", "layer1.mlp:zero"), ("llama", "layer1:infini(segment=8)")):
        got = readings(RopeBands(setting()).run(subjects(build(family), swap)))
        assert got["norm_share[band=1]", 1, None].n == 0


def test_of_some_heads_each_is_read_where_it_comes_from():
    model = build("llama")
    text = "layer1.heads[0]:infini(segment=16); layer1.heads[2]:sliding_window(window=2)"
    answers = Heads(setting()).run(subjects(model, text))
    got, own = readings(answers), readings(answers, "teacher")
    window = readings(Heads(setting()).run(subjects(model, "layer1:sliding_window(window=2)")))
    for stat in ("previous", "induction", "sink", "distance"):
        assert got[stat, 1, 0].n == 0  # a memory has no attention weights
        assert got[stat, 1, 2].value() == pytest.approx(window[stat, 1, 2].value(), rel=1e-5)
        for head in (1, 3):
            assert got[stat, 1, head].value() == pytest.approx(own[stat, 1, head].value(), rel=1e-5)
    masses = [got[key].value() for key in got if str(key[0]).startswith("mass") and key[1] == 1]
    assert sum(masses) == pytest.approx(1, abs=1e-4)
    bands = readings(RopeBands(setting()).run(subjects(model, text)))
    assert bands["norm_share[band=1]", 1, None].n == 0
