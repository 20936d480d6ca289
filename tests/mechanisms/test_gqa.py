"""Kv heads that are merged: planted copies are found again, what is lost is what numpy loses, and the result is an
ordinary attention with fewer of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_mechanism_contract import NO_NORMS
from tiny_models import in_chunks, part, swap, tiny, tokens
from transformers import DynamicCache

from mismatch.errors import SpecError, SurgeryError

IDS = tokens(2, 20)
MERGES = ("pca", "procrustes", "mean")


@pytest.mark.parametrize("family", ["llama", "mistral_window", "qwen2", "gemma2", "smollm3"])
def test_it_is_the_model_that_was_built_with_fewer_kv_heads(family):
    """transformers' own attention, from a config with one kv head, over the merged weights."""
    model = tiny(family)
    student = swap(model, "all:gqa(groups=1)").model
    twin = tiny(family, num_key_value_heads=1)
    twin.load_state_dict(student.state_dict())
    assert (student(IDS).logits - model(IDS).logits).abs().max() > 0.1
    torch.testing.assert_close(student(IDS).logits, twin(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("family, heads", [("gpt2", 4), ("gpt_neox", 4), ("phi3", 2)])
def test_with_all_kv_heads_it_is_the_attention(family, heads, merge):
    model = tiny(family)
    student = swap(model, f"all:gqa(groups={heads}, merge={merge})").model
    torch.testing.assert_close(student(IDS).logits, model(IDS).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("merge", MERGES)
def test_heads_that_are_not_merged_keep_their_weights(merge):
    """Another basis of the same heads would be rounded anew in bfloat16."""
    model = tiny("llama").bfloat16()
    attention = part(swap(model, f"layer1:gqa(groups=2, merge={merge})"))
    old = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert torch.equal(getattr(attention, name).weight, getattr(old, name).weight)
        bias = getattr(old, name).bias
        assert bias is None or torch.equal(getattr(attention, name).bias, bias)


def planted(family, length):
    """A model whose second kv head is the first one, turned in each rotary pair; its values turned anyhow.

    Args:
        length: of the second head's keys, over that of the first.
    """
    model = tiny(family).requires_grad_(False)
    draw = torch.Generator().manual_seed(3)
    for block in model.model.layers:
        k, v = block.self_attn.k_proj, block.self_attn.v_proj
        angle = torch.rand(4, generator=draw) * 6
        cos, sin = length * angle.cos(), length * angle.sin()
        turn = torch.linalg.qr(torch.randn(8, 8, generator=draw))[0]
        for k_part in (k.weight, k.bias) if k.bias is not None else (k.weight,):
            one, two = k_part[:4], k_part[4:8]
            along = (4,) + (1,) * (one.ndim - 1)
            k_part[8:12] = cos.view(along) * one - sin.view(along) * two
            k_part[12:16] = cos.view(along) * two + sin.view(along) * one
        v.weight[8:] = turn @ v.weight[:8]
        if v.bias is not None:
            v.bias[8:] = turn @ v.bias[:8]
    return model


@pytest.mark.parametrize("init", ["text", "weights"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_heads_that_are_turned_copies_are_found(family, init):
    model = planted(family, 1.0)
    wanted = model(IDS).logits
    found = {
        merge: swap(model, f"all:gqa(groups=1, merge={merge}, init={init})").model(IDS).logits
        for merge in MERGES
    }
    torch.testing.assert_close(found["pca"], wanted, atol=1e-3, rtol=0)
    torch.testing.assert_close(found["procrustes"], wanted, atol=1e-3, rtol=0)
    assert (found["mean"] - wanted).abs().max() > 0.1


def test_of_longer_copies_only_components_know():
    model = planted("llama", 3.0)
    off = {
        merge: (
            swap(model, f"all:gqa(groups=1, merge={merge})").model(IDS).logits - model(IDS).logits
        )
        for merge in MERGES
    }
    assert off["pca"].abs().max() < 1e-3
    assert off["procrustes"].abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_what_is_lost_is_what_numpy_loses(family):
    """Keys by the singular values of each pair of channels, values by those of all, each as it counts."""
    model, seen = tiny(family), []
    student = swap(model, "layer1:gqa(groups=1)")
    attention = model.get_submodule(student.layout.slot_path(1, "attn"))
    attention.register_forward_pre_hook(
        lambda _, args, call: seen.append(args[0] if args else call["hidden_states"]),
        with_kwargs=True,
    )
    model(tokens(2, 24, seed=99))  # the calibration text of these tests
    x = seen[0].detach()[0:2].flatten(0, 1)
    old = swap(model, "layer1:ring").model.get_submodule(student.layout.slot_path(1, "attn"))
    with torch.no_grad():
        q, k, v = (t.transpose(0, 1).double().numpy() for t in (h[0] for h in old.qkv(x[None])))
        _, one_k, one_v = (h[0, 0].double().numpy() for h in part(student).qkv(x[None]))
        output = old.output_matrix().numpy()  # `out H D`
    q = q.reshape(len(q), k.shape[1], -1, q.shape[-1])  # `tokens KV group D`
    output = output.reshape(len(output), *q.shape[1:])
    pairs, width = {"llama": (4, 8), "gpt_neox": (2, 4), "gpt2": (0, 0)}[family]
    for i in range(pairs):
        z, m = k[..., i] + 1j * k[..., i + pairs], one_k[:, i] + 1j * one_k[:, i + pairs]
        energy = np.square(q[..., [i, i + pairs]]).sum((0, 2, 3))
        check(z * np.sqrt(energy), m[:, None], 1)
    if width < k.shape[-1]:
        read = np.einsum("tkgd,tkge->kde", q[..., width:], q[..., width:])
        check(counted(k[..., width:], read), one_k[:, width:], k.shape[-1] - width)
    check(counted(v, np.einsum("okgd,okge->kde", output, output)), one_v, v.shape[-1])


def counted(heads, metric):
    """Channels `tokens KV D` of which the squares are those of a metric `KV D D`, side by side."""
    return np.einsum("tkd,kde->tke", heads, np.linalg.cholesky(metric)).reshape(len(heads), -1)


def check(full, merged, rank):
    """The best prediction of `full` from `merged` loses the singular values behind the rank."""
    fit = np.linalg.lstsq(merged, full, rcond=None)[0]
    lost = np.square(np.abs(full - merged @ fit)).sum()
    assert lost == pytest.approx(np.square(np.linalg.svd(full)[1][rank:]).sum(), rel=1e-3)


def test_the_mean_is_the_mean():
    model = tiny("llama")
    old, new = (
        model.model.layers[1].self_attn,
        part(swap(model, "layer1:gqa(groups=1, merge=mean)")),
    )
    for name in ("k_proj", "v_proj"):
        was, now = getattr(old, name), getattr(new, name)
        torch.testing.assert_close(now.weight, was.weight.unflatten(0, (2, 8)).mean(0))
        torch.testing.assert_close(now.bias, was.bias.unflatten(0, (2, 8)).mean(0))
    torch.testing.assert_close(new.q_proj.weight, old.q_proj.weight)


@pytest.mark.parametrize("family", NO_NORMS)
def test_the_cache_holds_the_heads_that_are_left(family):
    student, cache = swap(tiny(family), "layer1:gqa(groups=1)"), DynamicCache()
    student.model(IDS[:, :6], past_key_values=cache, use_cache=True)
    held = cache.layers[1]
    assert held.keys.shape[1] == held.values.shape[1] == 1
    assert cache.layers[0].keys.shape[1] > 1
    size, heads = held.keys.shape[-1], cache.layers[0].keys.shape[1]
    (note,) = student.plan.clauses[0].notes
    assert note == f"the cache holds {2 * size} numbers a token, not {2 * size * heads}"


def test_all_heads_as_a_place_are_the_layer_and_some_are_some():
    model = tiny("llama")
    whole = swap(model, "layer1:gqa(groups=1, init=weights)").model
    every = swap(model, "layer1.heads[0-3]:gqa(groups=1, init=weights)").model
    torch.testing.assert_close(every(IDS).logits, whole(IDS).logits, atol=1e-4, rtol=0)
    some = swap(model, "layer1.heads[0,3]:gqa(groups=1)").model
    assert (some(IDS).logits - whole(IDS).logits).abs().max() > 0.1
    torch.testing.assert_close(in_chunks(some, IDS, 6), some(IDS).logits, atol=1e-4, rtol=0)
    same = swap(model, "layer1.heads[0,3]:gqa(groups=2)").model
    torch.testing.assert_close(same(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "arguments, why",
    [
        ("groups=3", "`groups` must divide the module's 2 kv heads, got 3"),
        ("groups=0", "must be int >= 1, got 0"),
        ("groups=1, merge=sum", "must be one of pca, procrustes, mean, got `sum`"),
        ("groups=1, init=random", "must be one of text, weights, got `random`"),
        ("merge=pca", "needs `groups`"),
    ],
)
def test_rubbish_is_refused(arguments, why):
    with pytest.raises(SpecError, match=why):
        swap(tiny("llama"), f"layer1:gqa({arguments})")


@pytest.mark.parametrize(
    "family, what", [("qwen3", "q_norm, k_norm"), ("olmo2", "q_norm, k_norm"), ("gemma4", "v_norm")]
)
def test_norms_between_projections_and_heads_are_refused(family, what):
    with pytest.raises(
        SurgeryError, match=f"heads of this attention there is .*{what}, so no map"
    ) as error:
        swap(tiny(family), "layer1:gqa(groups=1)")
    assert "llama mistral qwen2" in str(error.value.hint)
