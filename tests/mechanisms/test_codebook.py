"""linear_attention(feature_map=codebook): exact where keys are codes, what k-means find, balance, size, refusals."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from lone_infini import stream
from lone_linear_attention import module
from reference_linear_attention import nearness
from test_initial_values import measured
from tiny_models import in_chunks, part, swap, tiny, tokens
from transformers import DynamicCache

from mismatch.errors import NumericsError, SpecError, SurgeryError
from mismatch.mechanisms.parts.codebook import SOFT, balanced, fitted

llama = functools.cache(tiny)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("settings", [{"window": 4, "sinks": 1}, {}], ids=str)
def test_where_keys_are_codes_it_is_softmax_with_far_tokens_off_their_place(settings, scale):
    """Inputs that take three values only, so that keys do too. At the larger scale logits are hundreds apart."""
    few = scale * stream(1, 3, seed=7, dtype=torch.float64)[0]
    order = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))
    x = few[order][None]
    linear = module(
        feature_map="codebook", codes=3, dtype=torch.float64, draw=False, text=x, **settings
    )
    bare_q, bare_k, v = linear.qkv(x)
    rotation = linear.rotary(x, torch.arange(40)[None])
    q, k = linear.rotate(bare_q, bare_k, rotation)
    logits, far_logits = (
        a @ linear.per_query_head(b).transpose(-1, -2) * linear.scaling
        for a, b in ((q, k), (bare_q, bare_k))
    )
    away = torch.arange(40)[:, None] - torch.arange(40)
    near = (away < settings.get("window", 0)) | (torch.arange(40) < settings.get("sinks", 0))
    logits = torch.where(near, logits, far_logits).masked_fill(away < 0, -torch.inf)
    wanted = linear.project(logits.softmax(-1) @ linear.per_query_head(v))
    got = linear(hidden_states=x, position_embeddings=rotation, attention_mask=None)[0]
    torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral_window"])
def test_with_a_window_as_long_as_the_text_it_is_the_teacher(family):
    model, ids = llama(family), tokens(2, 21)
    student = swap(model, "all:linear_attention(feature_map=codebook, codes=5, window=21)").model
    torch.testing.assert_close(student(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(in_chunks(student, ids, 6), model(ids).logits, atol=1e-4, rtol=0)


def test_codes_are_the_middles_of_planted_heaps():
    draws = torch.Generator().manual_seed(0)
    middles = 5 * torch.randn(4, 8, generator=draws).double()
    which = torch.arange(400) % 4
    keys = middles[which] + 0.1 * torch.randn(400, 8, generator=draws)
    codes, spread = fitted(keys, 4, seed=1)
    wanted = torch.stack([keys[which == m].mean(0) for m in range(4)])
    nearest = torch.cdist(wanted, codes).argmin(1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(codes[nearest], wanted, atol=1e-9, rtol=0)
    assert math.exp(spread) == pytest.approx(SOFT * 0.01, rel=0.1)
    assert torch.equal(fitted(keys, 4, seed=1)[0], codes)


def test_codes_are_of_keys_without_position_and_without_the_sinks():
    student = swap(
        llama("llama"), "layer0:linear_attention(feature_map=codebook, codes=3, sinks=1)"
    )
    mine = part(student, 0)
    ids = tokens(2, 24, seed=99)  # the calibration text of these tests
    block = student.model.model.layers[0]
    with torch.no_grad():
        x = block.input_layernorm(student.model.model.embed_tokens(ids))[:, 1:]
        keys = mine.qkv(x)[1].transpose(0, 1).flatten(1, 2)
    for own, codes in zip(keys, mine.map_k.codes, strict=True):
        at = torch.cdist(own, codes).argmin(1)
        means = torch.stack([own[at == m].mean(0) for m in range(3)])
        torch.testing.assert_close(codes, means, atol=1e-5, rtol=0)


def test_far_tokens_weigh_what_they_do_in_the_attention():
    call = "linear_attention(feature_map=codebook, codes=6, window=5, sinks=1, decay=learned)"
    mine, statistics, _ = measured(call)
    with torch.no_grad():
        for name in ("half-life", "gate"):
            mine.initial_values()[name](statistics)
        shares, theirs = [], []
        for x, given in statistics.runs:
            mine_now, attention = far_shares(mine, x, given)
            shares.append(mine_now)
            theirs.append(attention)
    got, wanted = (torch.cat(rows, 1).mean(1) for rows in (shares, theirs))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    assert (wanted > 0.05).all()
    assert mine.mix.std() > 0.01


def far_shares(mine, x, given):
    """Of the mechanism and of the attention, for late queries: `H queries` each; pair by pair."""
    found = {}

    def look(*args, **kwargs):
        found["rotation"] = kwargs["position_embeddings"]
        return x

    given(look, x)
    bare_q, bare_k, _ = mine.qkv(x)
    q, k = mine.rotate(bare_q, bare_k, found["rotation"])
    logits = (q @ mine.per_query_head(k).transpose(-1, -2) * mine.scaling).double()
    away = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    far = (away >= 5) & (torch.arange(x.shape[1]) > 0)
    theirs = logits.masked_fill(away < 0, -torch.inf).softmax(-1).masked_fill(~far, 0).sum(-1)
    mu, g = (torch.sigmoid(p.double()) for p in (mine.mix, mine.decay))
    counted = torch.stack(
        [
            torch.stack([nearness(one, *code) for one in own.flatten(0, 1)])
            for own, code in zip(
                bare_k.transpose(0, 1),
                zip(mine.map_k.codes, mine.map_k.spread, strict=True),
                strict=True,
            )
        ]
    ).unflatten(1, x.shape[:2])  # KV batch pos codes
    psi = torch.exp(mine.map_k.logits(bare_q, mine.scaling, None).double())
    weights = psi @ counted.double().repeat_interleave(2, dim=0).transpose(0, 1).transpose(-1, -2)
    weights = weights * g.repeat_interleave(2)[:, None, None] ** (away - 5).clamp(min=0)
    both = ((1 - mu)[:, None, None] * weights).masked_fill(~far, 0).sum(-1)
    near = (mu[:, None, None] * logits.exp()).masked_fill(far | (away < 0), 0).sum(-1)
    late = slice(x.shape[1] // 8, None)
    return tuple(
        share[..., late].transpose(0, 1).flatten(1) for share in (both / (both + near), theirs)
    )


def test_balance_finds_what_is_wanted_or_stops():
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).double()
    mix = torch.tensor([0.0, 1.0, -2.0]).double()
    wanted = torch.tensor([0.2, 0.7, 0.5]).double()
    found = balanced(torch.sigmoid(logits - mix[:, None]), mix, wanted)
    torch.testing.assert_close(torch.sigmoid(logits - found[:, None]).mean(1), wanted)
    nothing = balanced(torch.zeros(1, 9).double(), torch.zeros(1).double(), wanted[:1])
    assert nothing.isfinite().all()


def test_only_where_two_branches_share_a_denominator_is_there_a_balance():
    def parts(text, family="llama"):
        return [*part(swap(llama(family), f"layer1:linear_attention({text})")).initial_values()]

    assert parts("feature_map=codebook, codes=4, window=3, decay=learned") == ["half-life", "gate"]
    assert parts("feature_map=codebook, codes=4") == []
    assert parts("window=3, sinks=1") == []
    assert parts("feature_map=codebook, codes=4, window=9", "mistral_window") == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "text",
    [
        "feature_map=codebook, codes=5, window=6, sinks=2, decay=learned",
        "feature_map=codebook, codes=5",
        "window=3, sinks=1",
        "feature_map=elu, window=3",
    ],
)
def test_the_state_is_what_is_promised_and_does_not_grow(text, dtype):
    student = swap(tiny("llama").to(dtype), f"layer1:linear_attention({text})")
    promised = part(student).state_bytes()
    assert student.plan.clauses[0].state_bytes == promised
    cache = DynamicCache(config=student.model.config)
    for at in range(10):
        student.model(tokens(1, 2, seed=at), past_key_values=cache, use_cache=True)
    rows = cache.layers[1].rows.values()
    assert sum(x.untyped_storage().nbytes() for x in rows) == promised


@pytest.mark.parametrize(
    "arguments, why",
    [
        ("feature_map=codebook, codes=0", "must be int >= 1, got 0"),
        ("codes=32", "`codes=32` goes with feature_map=codebook, and the map is hedgehog"),
        (
            "feature_map=codebook, codes=47, sinks=1",
            "`codes=47` are k-means of keys, and the calibration text has 46 tokens with 46 different keys in a head",
        ),
    ],
)
def test_rubbish_is_refused(arguments, why):
    with pytest.raises(SpecError) as caught:
        swap(llama("llama"), f"layer1:linear_attention({arguments})")
    assert why in str(caught.value)
    assert "^" in str(caught.value)


def test_without_calibration_or_without_numbers_it_is_refused():
    with pytest.raises(SurgeryError, match="built from a calibration pass, and none was run"):
        module(feature_map="codebook", text=None)
    keys = torch.randn(9, 8)
    keys[3, 2] = math.nan
    with pytest.raises(NumericsError, match="keys of the calibration text"):
        fitted(keys, 2, seed=0)


def test_what_is_swapped_in_says_that_it_is_off_balance():
    (said,) = (
        swap(llama("llama"), "layer1:linear_attention(feature_map=codebook, codes=4)")
        .plan.clauses[0]
        .notes
    )
    assert said.startswith("decay and balance of the codebook are not set")
    assert "mismatch repair --stages inherit,closed-form" in said
    assert swap(llama("llama"), "layer1:linear_attention").plan.clauses[0].notes == ()
