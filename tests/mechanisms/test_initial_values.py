"""Initial values from the attention that is replaced: what is measured, what is set from it, and that it fits."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import FAMILIES, part, swap, tiny, tokens

from mismatch.mechanisms.parts.initial_values import (
    Statistics,
    centre_keys,
    key_rows,
    silu_inverse,
)
from mismatch.models.layout import Layout
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair, watch

LENGTH = 40


def measured(call, family="llama", distance="median", attn="eager", batches=4):
    """The mechanism in layer 1, its statistics over inputs that are mostly one vector, and both modules."""
    model = tiny(family, attn)
    layout = Layout.of(model)
    student = swap(tiny(family, attn), f"layer1:{call}")
    path = layout.slot_path(1, "attn")
    mine, theirs = part(student), model.get_submodule(path)
    runs = []
    called = watch(layout, [path], tokens(2, LENGTH), last=1)[path][2]
    draws = torch.Generator().manual_seed(0)
    shared = torch.randn(24, generator=draws)
    for _ in range(batches):
        runs.append((shared + 0.4 * torch.randn(2, LENGTH, 24, generator=draws), called))
    with torch.no_grad():
        statistics = Statistics(mine, runs, distance)
    return mine, statistics, ModulePair(1, "attn", path, theirs, mine)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_what_the_attention_gives_its_output_projection(family):
    mine, statistics, pair = measured("linear_attention", family)
    given = []
    projection = getattr(pair.teacher, mine._output)
    projection.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    for (x, call), heads in zip(statistics.runs, statistics.heads, strict=True):
        with torch.no_grad():
            call(pair.teacher, x)
        mine_too = heads.transpose(1, 2).flatten(-2)
        if mine.gated:  # the gate is the attention's own, and stays
            mine_too = mine_too * torch.sigmoid(mine._queries_and_gate(x)[1])
        torch.testing.assert_close(mine_too, given.pop(), atol=1e-5, rtol=1e-4)


def test_distances_are_those_of_the_attention_weights():
    """Against weights that transformers gives, summed token by token."""
    _, statistics, pair = measured("gated_deltanet")
    _, mean, _ = measured("gated_deltanet", distance="mean")
    early = LENGTH // 8
    at, sums, whole = torch.zeros(4, LENGTH), torch.zeros(4), 0
    for x, call in statistics.runs:
        for row in pair.teacher(x, **call.kwargs)[1]:
            for i in range(early, LENGTH):
                whole += 1
                for j in range(i + 1):
                    sums += row[:, i, j] * (i - j)
                    if j > 0:
                        at[:, i - j] += row[:, i, j]
    half = [
        next(d for d in range(LENGTH) if at[h, : d + 1].sum() >= at[h].sum() / 2) for h in range(4)
    ]
    assert statistics.half_life(4).tolist() == [d + 1 for d in half]
    torch.testing.assert_close(mean.half_life(4).float(), (sums / whole), atol=1e-3, rtol=1e-4)
    # Two query heads share a kv head: its distances are those of both.
    both = at.view(2, 2, -1).sum(1)
    pairs = [(row.cumsum(0) < row.sum() / 2).sum().item() + 1 for row in both]
    assert statistics.half_life(2).tolist() == pairs


@pytest.mark.parametrize("family", FAMILIES)
def test_centred_keys_are_the_same_keys_without_their_mean(family):
    mine, statistics, _ = measured("linear_attention", family)
    if getattr(mine, "v_proj", mine) is None:
        return
    linear, rows = key_rows(mine)
    x = torch.cat([x for x, _ in statistics.runs])
    with torch.no_grad():
        q, k, v = mine.qkv(x)
        raw = linear(x)
        centre_keys(mine, statistics)
        new_q, new_k, new_v = mine.qkv(x)
        moved = linear(x) - raw
    others = torch.ones(moved.shape[-1], dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(new_q, q) and torch.equal(new_v, v) and not torch.equal(new_k, k)
    assert not moved[..., others].any()
    mean, before = (y[..., rows].mean((0, 1)).norm() for y in (raw + moved, raw))
    assert mean < 1e-4 * before


def kept_by(mine):
    """What each head keeps of its state over one token, from the mechanism's own numbers."""
    name = type(mine).__name__
    if name == "GatedDeltaNet":
        rate = mine.mixer.A_log.exp() * torch.nn.functional.softplus(mine.mixer.dt_bias)
        assert not mine.write.weight[1::2].any()
        return (-rate).exp()
    if name == "Mamba2":
        assert not mine.step.weight.any()
        return (-mine.mixer.A_log.exp() * torch.nn.functional.softplus(mine.mixer.dt_bias)).exp()
    if name == "KDA":
        forget = mine.mixer.forget_gate
        assert not mine.decay.weight.any()
        rate = torch.nn.functional.softplus(forget.dt_bias).unflatten(0, (4, -1))
        assert (rate == rate[:, :1]).all() and not forget.A_log.any()
        return (-rate[:, 0]).exp()
    if name == "RWKV":
        decay = (-math.exp(-0.5) * torch.sigmoid(mine.w0)).exp().unflatten(0, (4, -1))
        assert (decay == decay[:, :1]).all()
        return decay[:, 0]
    return torch.sigmoid(mine.decay)


@pytest.mark.parametrize(
    "call",
    [
        "gated_deltanet",
        "mamba2",
        "rwkv",
        "kda",
        "linear_attention(decay=learned)",
        "linear_attention(feature_map=codebook, codes=5, decay=learned)",
    ],
)
def test_a_state_halves_over_the_half_life(call):
    mine, statistics, _ = measured(call)
    statistics.on_others.zero_()
    for head, away in enumerate((2, 2, 9, 9)):  # heads 0 and 1 share a kv head
        statistics.on_others[head, away] = 1.0
    with torch.no_grad():
        mine.initial_values()["half-life"](statistics)
    kept = kept_by(mine)
    tokens = torch.tensor([3.0, 10.0]).repeat_interleave(len(kept) // 2)
    torch.testing.assert_close(kept**tokens, torch.full_like(kept, 0.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("call", ["gated_deltanet", "kda"])
def test_without_a_bias_the_direction_of_all_inputs_says_how_much_is_written(call):
    mine, statistics, _ = measured(call)
    with torch.no_grad():
        mine.initial_values()["write"](statistics)
        x = torch.cat([x for x, _ in statistics.runs])
        written = mine.write(x)[..., ::2] if call == "gated_deltanet" else mine.write(x)
    assert written.mean().item() == pytest.approx(-1.0, abs=1e-4)
    assert written.std() < 0.2


@pytest.mark.parametrize("call", ["gated_deltanet", "mamba2(norm=before)", "rwkv", "kda"])
def test_the_gate_is_as_loud_as_the_attention(call):
    """Planted: heads of the mixer itself, each made longer and shorter by a linear map of x that is its own."""
    mine, statistics, _ = measured(call, batches=12)
    plain = mine.without_gate
    draws = torch.Generator().manual_seed(0)
    away = torch.randn(4, 24, generator=draws)
    x = torch.cat([x for x, _ in statistics.runs])
    away = 0.25 * away / (x @ away.T).std((0, 1))[:, None]
    level = torch.tensor([1.0, 2.0, 1.0, 2.0])
    with torch.no_grad():
        bare = [call_(plain, x) for x, call_ in statistics.runs]
        loud = [level * (1 + (x - statistics.mean.float()) @ away.T) for x, _ in statistics.runs]
        statistics.heads = [
            n * one.transpose(1, 2)[..., None] for n, one in zip(bare, loud, strict=True)
        ]
        mine.initial_values()["gate"](statistics)
        error = whole = flat = 0.0
        for (x, call_), a in zip(statistics.runs, statistics.heads, strict=True):
            h = heads_of(mine, call_, x)
            n = call_(plain, x)
            error += (h - a).square().sum()
            flat += (a - n * (a * n).sum() / n.square().sum()).square().sum()
            whole += a.square().sum()
    assert error < 0.01 * whole
    assert error < 0.2 * flat  # one number for all tokens and heads does not do


def heads_of(mine, call, x):
    given = []
    hook = mine.o_proj.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    call(mine, x)
    hook.remove()
    return given[0].unflatten(-1, (4, -1)).transpose(1, 2)


def test_silu_is_inverted():
    y = torch.tensor([0.02, 0.3, 1.0, 1.5, 20.0], dtype=torch.float64)
    torch.testing.assert_close(torch.nn.functional.silu(silu_inverse(y)), y)


def test_what_has_no_attention_to_learn_from_sets_nothing():
    for call in (
        "gated_deltanet(init=fresh)",
        "mamba2(init=fresh)",
        "rwkv(init=fresh)",
        "kda(init=fresh)",
    ):
        assert part(swap(tiny("llama"), f"layer1:{call}")).initial_values() == {}
    assert "gate" not in part(swap(tiny("llama"), "layer1:mamba2")).initial_values()
