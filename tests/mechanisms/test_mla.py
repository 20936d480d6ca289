"""Latent keys and values: the attention by complex numbers, what is lost against numpy, and planted models that lose
nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_gqa import check, counted, planted
from tiny_models import in_chunks, part, swap, tiny, tokens
from transformers import DynamicCache

from mismatch.errors import SpecError, SurgeryError
from mismatch.mechanisms.parts.rotary import own_frequencies

IDS = tokens(2, 20)
WIDTH = {"llama": 8, "qwen2": 8, "gemma2": 8, "phi3": 4, "gpt_neox": 4, "gpt2": 0}


def listened(model, path):
    """What goes into a module, and what comes out of it, in one forward over IDS."""
    seen = {}

    def look(_module, args, kwargs, out):
        seen.update(x=args[0] if args else kwargs["hidden_states"], y=out[0])

    handle = model.get_submodule(path).register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(IDS, use_cache=False)
    handle.remove()
    return seen["x"], seen["y"]


@pytest.mark.parametrize("rope_dim, rank", [(4, 6), (8, 12), (0, 10), (998, 9)])
@pytest.mark.parametrize("family", WIDTH)
@torch.no_grad()
def test_it_is_the_definition(family, rope_dim, rank):
    """Each head by itself in float64; a position turns a pair of r by exp(j p f)."""
    model = tiny(family)
    student = swap(model, f"layer1:mla(rank={rank}, rope_dim={rope_dim})")
    path = student.layout.slot_path(1, "attn")
    x, wanted = listened(student.model, path)
    attention = part(student)
    rotated = min(rope_dim, attention.n_kv_heads * WIDTH[family])
    frequencies = torch.zeros(0).double()
    if rotated:
        frequencies = own_frequencies(model.config, 1, WIDTH[family])[attention.pairs].double()
    cached = affine(attention.kv_down, x)
    turn = torch.polar(
        torch.ones(20, len(frequencies)).double(), torch.arange(20)[:, None] * frequencies
    )
    r = torch.complex(*cached[..., :rotated].chunk(2, dim=-1)) * turn
    made = affine(attention.kv_up, cached[..., rotated:])
    sides = made.unflatten(-1, (-1, attention.n_kv_heads, attention.head_dim))
    heads = []
    for h in range(4):
        kv = h * attention.n_kv_heads // 4
        scores = torch.zeros(2, 20, 20).double()
        if rotated < attention.n_kv_heads * attention.head_dim:
            q = affine(attention.q_proj, x).unflatten(-1, (4, -1))[:, :, h]
            scores += q @ sides[..., 0, kv, :].mT
        if rotated:
            q = affine(attention.q_turned, x).unflatten(-1, (4, -1))[:, :, h]
            q = torch.complex(*q.chunk(2, dim=-1)) * turn
            scores += (q @ r.mH).real
        scores = scores * attention.scaling
        if attention.softcap is not None:
            scores = attention.softcap * torch.tanh(scores / attention.softcap)
        i = torch.arange(20)
        reads = i <= i[:, None]
        if attention.window is not None:
            reads = reads & (i[:, None] - i < attention.window)
        weights = scores.masked_fill(~reads, -torch.inf).softmax(-1)
        heads.append(weights @ sides[..., -1, kv, :])
    output = getattr(attention, attention._output)
    got = output(torch.cat(heads, dim=-1).float())
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)


def affine(layer, x):
    y = x.double() @ layer.weight.double().T
    return y if layer.bias is None else y + layer.bias.double()


def on_calibration_text(model, path):
    """Queries, keys and values `tokens heads D`, and the output projection `out KV group D`, numpy."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda _, args, call: seen.append(args[0] if args else call["hidden_states"]),
        with_kwargs=True,
    )
    model(tokens(2, 24, seed=99))
    handle.remove()
    x = seen[0].detach().flatten(0, 1)
    old = swap(model, "layer1:ring").model.get_submodule(path)
    with torch.no_grad():
        q, k, v = (h[0].transpose(0, 1).double().numpy() for h in old.qkv(x[None]))
        output = old.output_matrix().numpy()
    group = q.shape[1] // k.shape[1]
    q = q.reshape(len(q), k.shape[1], group, -1)
    return x, q, k, v, output.reshape(len(output), k.shape[1], group, -1)


def test_of_a_model_without_rotation_it_loses_what_numpy_loses():
    """Keys and values together, each as it counts and divided by its size."""
    model = tiny("gpt2")
    student = swap(model, "layer1:mla(rank=9)")
    x, q, k, v, output = on_calibration_text(model, student.layout.slot_path(1, "attn"))
    sides = (
        counted(k, np.einsum("tkgd,tkge->kde", q, q)),
        counted(v, np.einsum("okgd,okge->kde", output, output)),
    )
    both = np.concatenate([side / np.linalg.norm(side) for side in sides], axis=1)
    check(both, part(student).kv_down(x).detach().double().numpy(), 9)


def test_what_is_rotated_are_the_first_components_of_each_pair():
    model = tiny("llama")
    student = swap(model, "layer1:mla(rank=9, rope_dim=10)")
    x, _, k, _, _ = on_calibration_text(model, student.layout.slot_path(1, "attn"))
    attention = part(student)
    r = attention.kv_down(x)[:, :10].detach().double().numpy()
    r = r[:, :5] + 1j * r[:, 5:]
    pairs = attention.pairs.numpy()
    assert len(set(pairs)) < 5  # a pair with both of its components
    for pair in set(pairs):
        z = k[..., pair] + 1j * k[..., pair + 4]
        held = r[:, pairs == pair]
        if held.shape[1] == 2:
            np.testing.assert_allclose(np.linalg.norm(held), np.linalg.norm(z), rtol=1e-4)
        else:
            assert any(
                np.isclose(np.linalg.norm(held), size, rtol=1e-3) for size in np.linalg.svd(z)[1]
            )


@pytest.mark.parametrize("init", ["text", "weights"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_kv_heads_that_are_copies_need_half_of_the_cache(family, init):
    model = planted(family, 2.0)
    wanted = model(IDS).logits
    half = swap(model, f"all:mla(rank=8, rope_dim=8, init={init})").model
    torch.testing.assert_close(half(IDS).logits, wanted, atol=2e-3, rtol=0)
    less = swap(model, f"all:mla(rank=4, rope_dim=8, init={init})").model
    assert (less(IDS).logits - wanted).abs().max() > 0.1


def test_a_pair_that_hardly_turns_needs_no_rotation():
    """With a base of 1e12 the first pair alone turns within 20 tokens."""
    model = tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e12})
    off = [
        (swap(model, f"layer1:mla(rank=99, rope_dim={n})").model(IDS).logits - model(IDS).logits)
        for n in (4, 0)
    ]
    assert off[0].abs().max() < 0.05
    assert off[1].abs().max() > 0.3


def test_under_yarn():
    """At the limit the attention is the same whatever turns it; cos and sin have a factor then."""
    model = tiny("llama")
    both = swap(model, "layer1:mla(rank=99, rope_dim=98); layer1:yarn(factor=4)").model
    wanted = swap(model, "layer1:yarn(factor=4)").model(IDS).logits
    torch.testing.assert_close(both(IDS).logits, wanted, atol=1e-5, rtol=0)
    # A pair that hardly turns: its score has the factor, although it is not rotated.
    model = tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e12})
    wanted = swap(model, "layer1:yarn(factor=4)").model(IDS).logits
    both = swap(model, "layer1:mla(rank=99, rope_dim=4); layer1:yarn(factor=4)").model
    assert (both(IDS).logits - wanted).abs().max() < 0.05


@pytest.mark.parametrize("family", WIDTH)
def test_the_cache_holds_the_latent(family):
    student, cache = swap(tiny(family), "layer1:mla(rank=5, rope_dim=4)"), DynamicCache()
    student.model(IDS[:, :6], past_key_values=cache, use_cache=True)
    rotated = min(4, 2 * WIDTH[family])
    held = cache.layers[1]
    assert held.keys.shape == (2, 1, 6, 5)
    assert held.values.shape == (2, 1, 6, rotated)
    (note,) = student.plan.clauses[0].notes
    own = cache.layers[0].keys
    assert (
        note
        == f"the cache holds {5 + rotated} numbers a token, not {2 * own.shape[1] * own.shape[3]}"
    )


@pytest.mark.parametrize("rope_dim", [0, 4, 98])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_it_holds_no_parameter_that_it_does_not_use(family, rope_dim):
    """Where all of the keys is rotated nothing reads the queries that are not; DDP waits for their gradient."""
    student = swap(tiny(family), f"layer1:mla(rank=5, rope_dim={rope_dim})")
    student.model.requires_grad_(True)(IDS).logits.square().mean().backward()
    assert [name for name, p in part(student).named_parameters() if p.grad is None] == []


def test_in_some_heads():
    model = tiny("llama")
    call = "mla(rank=9, rope_dim=4, init=weights)"
    whole, every = (swap(model, f"layer1{heads}:{call}").model for heads in ("", ".heads[0-3]"))
    torch.testing.assert_close(every(IDS).logits, whole(IDS).logits, atol=1e-4, rtol=0)
    some = swap(model, f"layer1.heads[0,3]:{call}").model
    assert (some(IDS).logits - whole(IDS).logits).abs().max() > 0.1
    torch.testing.assert_close(in_chunks(some, IDS, 6), some(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "arguments, why",
    [
        ("rank=4, rope_dim=3", "`rope_dim` must be even, got 3"),
        ("rank=0", "must be int >= 1, got 0"),
        ("rank=4, rope_dim=-2", "must be int >= 0, got -2"),
        ("rope_dim=4", "needs `rank`"),
    ],
)
def test_rubbish_is_refused(arguments, why):
    with pytest.raises(SpecError, match=why):
        swap(tiny("llama"), f"layer1:mla({arguments})")


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "gemma4"])
def test_norms_between_projections_and_heads_are_refused(family):
    with pytest.raises(SurgeryError, match="so no map of its heads can be folded"):
        swap(tiny(family), "layer1:mla(rank=4)")
