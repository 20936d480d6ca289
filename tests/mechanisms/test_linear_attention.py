"""Linear attention and its hybrid with a window: the definition, its limits, and what each option does."""

from __future__ import annotations

import pytest
import torch
from lone_infini import run, state_after, stream
from lone_linear_attention import VARIANTS, by_definition, module
from reference_linear_attention import phi
from tiny_models import FAMILIES, in_chunks, part, positions, swap, tiny, tokens

from mismatch.mechanisms.linear_attention import LinearAttention
from mismatch.mechanisms.parts import packing
from mismatch.mechanisms.parts.feature_maps import ACTIVATIONS, FeatureMap
from mismatch.models.layout import Layout
from mismatch.models.private import same_memory

LENGTHS = (1, 2, 4, 5, 13, 22)
OWN = ("mistral_window", "gemma2", "gemma3", "qwen2", "phi3", "olmo3", "gemma4")


@pytest.fixture(params=[4, 64], ids=lambda size: f"chunks-of-{size}")
def chunk(request, monkeypatch):
    """Chunks short enough that a short text has many of them, and the one that is used."""
    monkeypatch.setattr(packing, "CHUNK", request.param)
    return request.param


# the definition ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_output_and_memory_are_those_of_the_definition(settings, length, chunk):
    linear, x = module(**settings), stream(2, length)
    heads, memory = by_definition(linear, x)
    wanted = linear.project(heads.float())
    torch.testing.assert_close(run(linear, x), wanted, atol=2e-5, rtol=1e-4)
    got = state_after(linear, x).rows["memory"]
    torch.testing.assert_close(got, memory.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_gradients_are_those_of_the_definition(settings, chunk):
    linear = module(dtype=torch.float64, **settings).requires_grad_(True)
    x = stream(1, 14, dtype=torch.float64).requires_grad_(True)
    weight = stream(1, 14, seed=5, dtype=torch.float64)
    tensors = {"x": x, **dict(linear.named_parameters())}
    wanted = torch.autograd.grad(
        (linear.project(by_definition(linear, x)[0]) * weight).sum(), tensors.values()
    )
    got = torch.autograd.grad((run(linear, x) * weight).sum(), tensors.values())
    for name, a, b in zip(tensors, got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_more_tokens_than_one_chunk_of_64():
    linear, x = module(window=9, sinks=1, decay="learned"), stream(1, 70)
    heads, memory = by_definition(linear, x)
    torch.testing.assert_close(run(linear, x), linear.project(heads.float()), atol=2e-5, rtol=1e-4)
    got = state_after(linear, x).rows["memory"]
    torch.testing.assert_close(got, memory.float(), atol=1e-5, rtol=1e-4)


def test_without_window_it_is_the_recurrence():
    """S <- g S + phi(k) v^T, z <- g z + phi(k), y = phi(q) S / phi(q) z, in another form than above."""
    linear, x = module(feature_map="elu", decay="learned", dtype=torch.float64), stream(1, 30)
    x = x.double()
    q, k, v = linear.qkv(x)
    q, k = linear.rotate(q, k, linear.rotary(x, torch.arange(30)[None]))
    g = torch.sigmoid(linear.decay)
    heads = torch.zeros_like(q)
    for h in range(4):
        s, z = torch.zeros(8, 8).double(), torch.zeros(8).double()
        for t in range(30):
            key = phi(k[0, h // 2, t], "elu")
            s, z = g[h // 2] * s + torch.outer(key, v[0, h // 2, t]), g[h // 2] * z + key
            query = phi(q[0, h, t], "elu")
            heads[0, h, t] = query @ s / (query @ z)
    torch.testing.assert_close(run(linear, x), linear.project(heads), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "settings", [s for s in VARIANTS if s.get("feature_map") != "relu"], ids=str
)
def test_it_is_a_weighted_mean_of_the_values(settings):
    linear, x = module(**settings), stream(2, 22)
    linear.v_proj = Constant(3.25)
    heads = torch.full((2, 4, 22, 8), 3.25)
    torch.testing.assert_close(run(linear, x), linear.project(heads), atol=1e-5, rtol=0)


class Constant(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full((*x.shape[:2], 16), self.value)


@pytest.mark.parametrize("settings", [{"window": 4}, {"window": 4, "sinks": 1}], ids=str)
def test_the_softcap_is_in_the_softmax_and_not_in_the_sum(settings):
    linear, x = module(family="gemma2", **settings), stream(1, 13)
    assert linear.softcap == 2.0
    heads = by_definition(linear, x)[0]
    torch.testing.assert_close(run(linear, x), linear.project(heads.float()), atol=2e-5, rtol=1e-4)
    linear.softcap = None
    assert (run(linear, x) - linear.project(heads.float())).abs().max() > 1e-3


# the identity limit ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_window_as_long_as_the_text_it_is_the_teacher(family):
    model, ids = tiny(family), tokens(2, 21)
    # Sinks reach behind a window of the module's own.
    for settings in ["window=21"] + ["window=500, decay=learned, sinks=3"] * (family not in OWN):
        student = swap(model, f"all:linear_attention({settings})").model
        torch.testing.assert_close(student(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_with_a_window_as_long_as_the_text_it_is_the_teacher_under_padding_and_in_pieces():
    model, ids = tiny("llama"), tokens(3, 20)
    student = swap(model, "all:linear_attention(window=20)").model
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, :2] = 0
    at = {"attention_mask": mask, "position_ids": positions(mask)}
    wanted = model(ids, **at).logits[mask == 1]
    torch.testing.assert_close(student(ids, **at).logits[mask == 1], wanted, atol=1e-5, rtol=0)
    for size in (1, 6):
        got = in_chunks(student, ids, size, mask)[mask == 1]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["mistral_window", "gemma2", "qwen2"])
def test_a_window_of_the_modules_own_is_kept_where_it_is_narrower(family):
    """Windows of 6 to 9 tokens; the text has 40."""
    model, ids = tiny(family), tokens(2, 40)
    student = swap(model, "layer0:linear_attention(window=9); layer2:linear_attention(window=9)")
    windows = {clause.layer: part(student, clause.layer).window for clause in student.plan.clauses}
    assert any(windows.values())
    for clause in student.plan.clauses:
        own = windows[clause.layer]
        note = f"the module's own window of {own} tokens is kept; nothing is linear"
        assert clause.notes == ((note,) if own else ())
        if own:
            lone = swap(model, f"layer{clause.layer}:linear_attention(window=9)").model
            torch.testing.assert_close(lone(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
            torch.testing.assert_close(
                in_chunks(lone, ids, 7), model(ids).logits, atol=1e-4, rtol=0
            )


def test_behind_a_wider_window_of_its_own_the_sum_reaches_to_the_first_token():
    model, ids = tiny("mistral_window"), tokens(2, 40)
    student = swap(model, "layer2:linear_attention(window=3)")
    assert student.plan.clauses[0].notes == (
        "the module's own window of 7 tokens is gone: the sum reaches back to the first token",
    )
    other = ids.clone()
    other[:, 0] = (ids[:, 0] + 1) % 59 + 2
    a, b = (model(x).logits[:, -1] for x in (ids, other))
    assert torch.equal(a, b), "three windows of 7 do not reach 39 tokens back"
    a, b = (student.model(x).logits[:, -1] for x in (ids, other))
    assert (a - b).abs().max() > 1e-6


# order and causality ---------------------------------------------------------------------


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("t", [3, 8, 17])
def test_no_token_sees_a_later_one(settings, t, chunk):
    linear, x = module(**settings), stream(2, 22)
    y = x.clone()
    y[:, t:] += stream(2, 22, seed=9)[:, t:]
    a, b = run(linear, x), run(linear, y)
    torch.testing.assert_close(a[:, :t], b[:, :t], atol=1e-6, rtol=0)
    assert (a[:, t:] - b[:, t:]).abs().max() > 1e-2


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_what_is_rotated_is_seen_by_its_distance_in_the_window_only(settings):
    """phi of a rotated key is no function of the distance: the far sum knows where it stands. Codes have no place."""
    linear, x = module(**settings), stream(1, 22)
    shift = (run(linear, x, offset=37) - run(linear, x)).abs().max()
    near = run(module(**{**settings, "window": 22}), x, offset=37)
    torch.testing.assert_close(
        near, run(module(**{**settings, "window": 22}), x), atol=1e-4, rtol=0
    )
    assert shift < 1e-4 if settings.get("feature_map") == "codebook" else shift > 1e-3


# numbers that are hard ---------------------------------------------------------------------


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
def test_finite_forward_and_backward(settings, scale, chunk):
    linear, x = module(**settings), (scale * stream(2, 22)).requires_grad_(True)
    out = run(linear, x)
    out.pow(2).mean().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in linear.parameters() if p.grad is not None)


def test_keys_that_no_query_meets_read_as_zero():
    linear, x = module(feature_map="relu"), stream(1, 9).requires_grad_(True)
    with torch.no_grad():
        for proj, value in ((linear.q_proj, 1.0), (linear.k_proj, -1.0)):
            proj.weight.zero_()
            proj.bias.fill_(value)
    linear._rotary = None
    out = run(linear, x)
    assert torch.equal(out, linear.project(torch.zeros(1, 4, 9, 8)))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x.grad))


@pytest.mark.parametrize("logit", [-40.0, -5.0, 40.0])
def test_any_decay_over_many_tokens_is_finite_and_right(logit):
    """g^n underflows after a few tokens, and its inverse, which other forms divide by, overflows."""
    linear, x = module(window=2, decay="learned"), stream(1, 200)
    with torch.no_grad():
        linear.decay.fill_(logit)
    out = run(linear, x)
    heads = by_definition(linear, x[:, :40])[0]
    torch.testing.assert_close(out[:, :40], linear.project(heads.float()), atol=2e-5, rtol=1e-4)
    out.pow(2).mean().backward()
    assert all(p.grad.isfinite().all() for p in linear.parameters() if p.grad is not None)


def test_decay_starts_as_in_retnet_and_forgets():
    linear = module(decay="learned", draw=False)
    torch.testing.assert_close(torch.sigmoid(linear.decay), torch.tensor([31 / 32, 63 / 64]))
    x, y = stream(1, 22), stream(1, 22)
    y[:, 0] += 5.0

    def trace_of_the_first(logit):
        with torch.no_grad():
            linear.decay.fill_(logit)
        return (run(linear, x)[:, -1] - run(linear, y)[:, -1]).abs().max()

    assert trace_of_the_first(-3.0) < 1e-6 < 1e-3 < trace_of_the_first(30.0)
    plain = module(draw=False)
    torch.testing.assert_close(run(linear, x), run(plain, x), atol=1e-5, rtol=0)


# maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_map_is_its_formula(name):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(2, 4, 5, 8, generator=generator, dtype=torch.float64)
    built = FeatureMap(name, 4, 8, {"dtype": torch.float64})
    with torch.no_grad():
        for weight in built.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    got = built(x)
    assert (got >= 0).all()
    for b, h, t in ((0, 0, 0), (1, 3, 4), (0, 2, 1)):
        own = {kind: value[h] for kind, value in built.named_parameters()}
        torch.testing.assert_close(got[b, h, t], phi(x[b, h, t], name, **own))


@pytest.mark.parametrize("learned, fixed", [("hedgehog", "softmax"), ("learned", "relu")])
def test_learned_maps_start_as_their_fixed_ones(learned, fixed):
    x = stream(2, 22)
    a, b = (module(feature_map=name, window=3, draw=False) for name in (learned, fixed))
    assert torch.equal(run(a, x), run(b, x))
    assert a.map_q.weight.shape == (4, 8, 8)
    assert a.map_k.weight.shape == (2, 8, 8)


# branches --------------------------------------------------------------------------------------


def test_what_its_two_branches_take_away_adds_up_to_the_whole():
    linear, x = module(window=4, decay="learned"), stream(2, 22)
    linear.o_proj.bias.data.zero_()
    whole, without = run(linear, x), {}
    for name, out in linear.branches().items():
        with out:
            without[name] = run(linear, x)
    assert without.keys() == {"near", "far"}
    assert torch.equal(run(linear, x), whole)
    assert torch.equal(without["near"][:, :4], torch.zeros_like(whole[:, :4])), "nothing is far yet"
    assert (without["near"][:, 4:].abs().amax(-1) > 1e-3).all()
    added = sum(whole - rest for rest in without.values())
    torch.testing.assert_close(added, whole, atol=1e-5, rtol=0)
    assert linear.gates().keys() == {"near"}


@pytest.mark.parametrize("settings", [{}, {"feature_map": "elu", "decay": "learned"}], ids=str)
def test_one_sum_alone_has_no_branches(settings):
    linear = module(**settings)
    assert linear.branches() == linear.gates() == linear.restores() == {}
    assert module(family="mistral_window", window=9).branches() == {}


def test_the_first_token_can_be_given_back():
    linear, x = module(window=4), stream(2, 22)
    before = run(linear, x)
    with linear.restores()["first_token"]:
        got = run(linear, x)
    other = module(window=4, sinks=1)
    assert torch.equal(got, run(other, x))
    assert torch.equal(run(linear, x), before)
    assert other.restores() == {}


# heads and parameters --------------------------------------------------------------------------


def test_query_head_h_uses_kv_head_h_over_group():
    """Equal to the same module with one kv head per query head and repeated weights."""
    grouped, x = module(window=3, sinks=1, decay="learned"), stream(2, 22)
    attention = Layout.of(tiny("llama", num_key_value_heads=4)).blocks[1].self_attn
    for name in ("k_proj", "v_proj"):
        for kind in ("weight", "bias"):
            value = getattr(getattr(grouped, name), kind)
            repeated = value.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
            setattr(getattr(attention, name), kind, torch.nn.Parameter(repeated))
    attention.q_proj, attention.o_proj = grouped.q_proj, grouped.o_proj
    each = LinearAttention(attention, grouped.settings, grouped.context).eval()
    each.mix, each.map_q, each.rotary = grouped.mix, grouped.map_q, grouped.rotary
    for name in ("decay", "map_k.weight"):
        each.get_parameter(name).data = grouped.get_parameter(name).repeat_interleave(2, dim=0)
    assert (each.n_kv_heads, grouped.n_kv_heads) == (4, 2)
    torch.testing.assert_close(run(grouped, x), run(each, x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings, new",
    [
        ("feature_map=elu", {}),
        ("", {"map_q.weight": 256, "map_k.weight": 128}),
        ("feature_map=softmax, window=4", {"mix": 4}),
        ("feature_map=relu, decay=learned, sinks=1", {"mix": 4, "decay": 2}),
        ("feature_map=learned", {"map_q.weight": 256, "map_k.weight": 128, "map_q.bias": 32,
                                 "map_k.bias": 16}),
    ],
)  # fmt: skip
def test_inherited_and_new_parameters(settings, new):
    model = tiny("llama")
    student = swap(model, f"layer1:linear_attention({settings})")
    clause = student.plan.clauses[0]
    assert clause.new_parameters == new
    assert clause.dropped == {}
    theirs = dict(Layout.of(model).blocks[1].self_attn.named_parameters())
    assert clause.inherited.keys() == theirs.keys()
    mine = part(student)
    assert all(same_memory(mine.get_parameter(name), p) for name, p in theirs.items())
