"""Heads of a layer from a mechanism, the others from the attention: beside attention that is computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from test_mechanism_contract import LENGTH
from tiny_models import FAMILIES, in_chunks, part, swap, tiny, tokens
from transformers import DynamicCache

from mismatch.errors import SpecError, SurgeryError
from mismatch.mechanisms.parts.side_by_side import SomeKVHeads
from mismatch.models.layout import Layout, family_of
from mismatch.spec import parse
from mismatch.surgery.controls import control_specs
from mismatch.surgery.operate import layout_of, operate, placed

HEADS, KV, DIM = 4, 2, 8  # of the tiny llama
SOME = ("llama", "gemma3", "olmo2", "phi3", "gpt2", "gpt_neox")  # one of each kind of projections


def called(model, layer, ids, cache=None):
    """How the block calls its attention, and what that gives."""
    seen = []
    module = model.get_submodule(f"model.layers.{layer}.self_attn")
    handle = module.register_forward_hook(
        lambda m, args, kwargs, out: seen.append((kwargs, out[0])), with_kwargs=True
    )
    model(ids, use_cache=False)
    handle.remove()
    return seen[-1]


def by_hand(attention, x, cos, sin, reads):
    """Softmax attention of a llama in float64, head by head, in plain sums.

    Args:
        attention: the teacher's, for its matrices.
        x: `pos d`; one text.
        cos, sin: `pos D`.
        reads: `reads(head, query, key)`: may it be read; `None` instead of a function of a head: it gives zeros.
    """
    x = x.double()

    def projected(layer):
        return x @ layer.weight.double().T + layer.bias.double()

    def rotated(row, at):
        half = DIM // 2
        turned = torch.cat([-row[half:], row[:half]])
        return row * cos[at].double() + turned * sin[at].double()

    q, k, v = (projected(m) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
    out = torch.zeros(len(x), HEADS * DIM, dtype=torch.float64)
    for head in range(HEADS):
        if reads[head] is None:
            continue
        kv = head // (HEADS // KV)
        mine, theirs = slice(head * DIM, (head + 1) * DIM), slice(kv * DIM, (kv + 1) * DIM)
        for i in range(len(x)):
            allowed = [j for j in range(i + 1) if reads[head](i, j)]
            scores = torch.stack(
                [rotated(q[i, mine], i) @ rotated(k[j, theirs], j) for j in allowed]
            )
            weights = (scores / math.sqrt(DIM)).softmax(0)
            out[i, mine] = sum(w * v[j, theirs] for w, j in zip(weights, allowed, strict=True))
    return out @ attention.o_proj.weight.double().T + attention.o_proj.bias.double()


def causal(i, j):
    return True


def window(i, j):
    return i - j < 5 or j < 2


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        ("heads[1,2]:sliding_window(window=5, sinks=2)", (causal, window, window, causal)),
        ("kv_heads[1]:sliding_window(window=5, sinks=2)", (causal, causal, window, window)),
        ("heads[0,3]:zero", (None, causal, causal, None)),
        ("heads[0-3]:sliding_window(window=5, sinks=2)", (window,) * 4),
        (
            "heads[3]:zero; layer1.heads[0]:sliding_window(window=5, sinks=2)",
            (window, causal, causal, None),
        ),
    ],
)
@torch.no_grad()
def test_it_is_attention_with_these_heads_from_the_other(text, reads):
    teacher, ids = tiny("llama"), tokens(1, 13)
    kwargs, got = called(swap(teacher, f"layer1.{text}").model, 1, ids)
    cos, sin = kwargs["position_embeddings"]
    attention = teacher.model.layers[1].self_attn
    wanted = by_hand(attention, kwargs["hidden_states"][0], cos[0], sin[0], reads)
    torch.testing.assert_close(got[0].double(), wanted, atol=1e-5, rtol=0)


def before_the_projection(model, layer, ids):
    """The heads, flat: what enters the output projection. And the update of the layer."""
    seen = []
    module = part_of(model, layer)
    name = next(n for n in ("o_proj", "dense", "c_proj") if hasattr(module, n))
    handle = module.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args))
    out = []
    update = module.register_forward_hook(lambda m, args, result: out.append(result[0]))
    model(ids, use_cache=False)
    handle.remove()
    update.remove()
    return seen[-1][0], out[-1], module.get_submodule(name)


def part_of(model, layer):
    path = Layout(model, family_of(model.config)).slot_path(layer, "attn")
    return model.get_submodule(path)


@pytest.mark.parametrize(
    "call", ["infini(segment=4)", "linear_attention(window=3)", "nope", "gated_deltanet"]
)
@pytest.mark.parametrize("family", SOME)
@torch.no_grad()
def test_each_head_is_that_of_the_whole_layer_and_the_projection_comes_once(family, call):
    if call == "nope" and family == "gpt2":
        call = "ring(block=4)"  # it has nothing that nope could remove
    teacher, ids = tiny(family), tokens(2, LENGTH)
    dim = before_the_projection(teacher, 0, ids)[0].shape[-1] // HEADS
    own, _, projection = before_the_projection(teacher, 0, ids)
    whole = before_the_projection(swap(teacher, f"layer0:{call}").model, 0, ids)[0]
    student = swap(teacher, f"layer0.heads[0,2]:{call}").model
    got, changed, inherited = before_the_projection(student, 0, ids)
    for head in range(HEADS):
        mine = slice(head * dim, (head + 1) * dim)
        source = whole if head in (0, 2) else own
        torch.testing.assert_close(got[..., mine], source[..., mine], atol=1e-5, rtol=0)
    assert torch.equal(inherited.weight, projection.weight)
    assert torch.equal(changed, projection(got))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_in_any_head_identity_is_the_teacher_to_the_bit(family):
    teacher, ids = tiny(family), tokens(2, LENGTH)
    for text in ("heads[1]:identity", "kv_heads[0]:identity", "heads[0-3]:identity"):
        student = swap(teacher, f"layer1.{text}")
        assert torch.equal(student.model(ids).logits, teacher(ids).logits)
        student.undo()
        assert torch.equal(student.model(ids).logits, teacher(ids).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_the_mean_is_that_of_the_heads_in_front_of_the_projection(family):
    teacher = tiny(family)
    ids = tokens(2, 24, seed=99)  # those that `swap` calibrates on
    flat = before_the_projection(teacher, 1, ids)[0]
    got = before_the_projection(swap(teacher, "layer1.heads[1]:mean").model, 1, ids)[0]
    dim = flat.shape[-1] // HEADS
    mean = flat[:, 1:].reshape(-1, flat.shape[-1]).mean(0)[dim : 2 * dim]  # position 0 is left out
    torch.testing.assert_close(got[0, 5, dim : 2 * dim], mean, atol=1e-5, rtol=0)
    assert torch.equal(got[..., 2 * dim :], flat[..., 2 * dim :])


@torch.no_grad()
def test_where_no_head_is_left_the_attention_is_gone():
    teacher, ids = tiny("llama"), tokens(2, LENGTH)
    whole = swap(teacher, "layer1:infini(segment=8)").model
    student = swap(teacher, "layer1.heads[0-1]:infini(segment=8); layer1.kv_heads[1]:zero")
    assert part(student).original is None
    both = swap(teacher, "layer1.heads[0-3]:infini(segment=8)")
    torch.testing.assert_close(both.model(ids).logits, whole(ids).logits, atol=1e-5, rtol=0)
    cache = DynamicCache(config=teacher.config)
    both.model(ids, past_key_values=cache)
    assert type(cache.layers[1]).__name__ == "OwnState"  # and nothing beside it


@torch.no_grad()
def test_the_attention_keeps_the_kv_heads_that_its_heads_read():
    teacher, ids = tiny("llama"), tokens(2, LENGTH)
    for text, kept in (("kv_heads[0]", [1]), ("heads[0]", None), ("heads[0,1,2]", [1])):
        student = swap(teacher, f"layer1.{text}:infini(segment=8)")
        cache = DynamicCache(config=teacher.config)
        student.model(ids, past_key_values=cache)
        own = cache.layers[1].each[0]
        assert isinstance(own, SomeKVHeads) == (kept is not None)
        assert own.keys.shape[1] == (KV if kept is None else len(kept))
        whole = student.model(ids, use_cache=False).logits
        torch.testing.assert_close(in_chunks(student.model, ids, 5), whole, atol=1e-4, rtol=0)
        words = student.plan.clauses[0].state
        assert "keys, values and keys without position of at most segment - 1 tokens" in words
        assert f"kv head{'s 0-1' if kept is None else ' 1'} of the host's KV cache" in words


def test_the_plan_counts_every_tensor_once():
    teacher = tiny("llama")
    student = swap(teacher, "layer1.heads[0]:infini(segment=8); layer1.heads[3]:infini(sinks=1)")
    first, second = student.plan.clauses
    host = {n: p.numel() for n, p in teacher.model.layers[1].self_attn.named_parameters()}
    assert first.inherited == host
    assert sorted(second.inherited.values()) == sorted(host.values())
    assert (first.new_parameters, second.new_parameters) == (
        {"parts.0.gate": 4},
        {"parts.1.gate": 4},
    )
    assert first.dropped == second.dropped == {}
    assert (first.heads, second.heads) == ((0,), (3,))
    assert (first.old, first.new) == (second.old, second.new) == ("LlamaAttention", "Infini")
    grown = sum(p.numel() for p in student.model.parameters())
    assert grown == sum(p.numel() for p in teacher.parameters()) + 8


def test_controls_go_to_the_same_heads():
    student = swap(
        tiny("llama"), "layer1.heads[0]:nope; layer1.kv_heads[1]:infini; layer2.mlp:mean"
    )
    specs = control_specs(("zero", "identity", "skip"), student.plan)
    assert str(specs["zero"]) == "layer1.heads[0,2-3]:zero; layer2.mlp:zero"
    assert str(specs["identity"]) == "layer1.heads[0,2-3]:identity; layer2.mlp:identity"
    assert str(specs["skip"]) == "layer2.block:skip; layer1.block:skip"


@torch.no_grad()
def test_a_swapped_model_takes_a_mechanism_in_its_other_heads():
    teacher, ids = tiny("llama"), tokens(2, LENGTH)
    at_once = swap(teacher, "layer1.heads[0]:zero; layer1.heads[2]:sliding_window(window=5)").model
    first = swap(teacher, "layer1.heads[0]:zero").model
    layout = layout_of(first)
    text = "layer1.heads[2]:sliding_window(window=5)"
    then = operate(layout, placed(parse(text), layout), spec=text)
    assert torch.equal(then.model(ids).logits, at_once(ids).logits)
    then.undo()
    assert torch.equal(then.model(ids).logits, first(ids).logits)
    with pytest.raises(SpecError, match="layer 1 head 0 is replaced twice"):
        placed(parse("layer1.heads[0]:nope"), layout)


@torch.no_grad()
def test_what_stands_around_all_heads_stands_around_these_too():
    teacher, ids = tiny("llama"), tokens(2, LENGTH)
    some = "layer1.heads[0]:infini(segment=8)"
    both = swap(teacher, f"{some}; layer1:zero").model
    assert torch.equal(both(ids).logits, swap(teacher, "layer1:zero").model(ids).logits)
    whole = swap(teacher, "layer1:nope").model
    around = swap(teacher, "layer1.heads[0]:identity; layer1:nope").model
    assert torch.equal(around(ids).logits, whole(ids).logits)
    lora = swap(teacher, f"{some}; layer1:lora(r=2, targets=all)").model
    torch.testing.assert_close(
        lora(ids).logits, swap(teacher, some).model(ids).logits, atol=1e-5, rtol=0
    )
    with pytest.raises(SurgeryError, match="decides by itself what it attends to"):
        swap(teacher, f"{some}; layer1:sliding_window(window=5)")


def test_dropout_behind_the_projection_comes_once():
    """gpt2's own, inside its attention: half of the numbers are dropped, and the others doubled."""
    model = swap(
        tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.0), "layer1.heads[0]:ring(block=8)"
    ).model
    torch.manual_seed(0)
    flat, update, projection = before_the_projection(model.train(), 1, tokens(4, LENGTH))
    dropped = update == 0
    assert 0.4 < dropped.float().mean() < 0.6
    torch.testing.assert_close(update[~dropped], 2 * projection(flat)[~dropped], atol=1e-5, rtol=0)


def test_a_fresh_layer_has_no_heads_of_the_attention():
    with pytest.raises(SpecError, match="`mamba2` without init=inherit cannot take some heads"):
        swap(tiny("llama"), "layer1.heads[0]:mamba2(init=fresh)")
    with pytest.raises(SpecError, match="`lora` cannot take some heads"):
        swap(tiny("llama"), "layer1.heads[0]:lora")


def test_a_cache_of_another_model_is_refused():
    teacher, ids = tiny("llama"), tokens(2, LENGTH)
    cache = DynamicCache(config=teacher.config)
    teacher(ids, past_key_values=cache)
    with pytest.raises(SurgeryError, match="was written by a model without these heads"):
        swap(teacher, "layer1.heads[0]:infini").model(ids, past_key_values=cache)


@torch.no_grad()
def test_a_mechanism_of_the_users_own_can_take_heads_if_it_says_so(theirs):
    teacher, ids = tiny("llama"), tokens(2, LENGTH)
    student = swap(teacher, "layer0.heads[1]:theirs.parts:OwnTokens").model
    flat = before_the_projection(student, 0, ids)[0]
    stream = teacher.model.embed_tokens(ids)
    attention, norm = teacher.model.layers[0].self_attn, teacher.model.layers[0].input_layernorm
    values = attention.v_proj(norm(stream))[..., :DIM]  # kv head 0
    torch.testing.assert_close(flat[..., DIM : 2 * DIM], values, atol=1e-5, rtol=0)
    for name in ("Half", "Past"):
        with pytest.raises(SpecError, match=f"`theirs.parts:{name}` cannot take some heads"):
            swap(teacher, f"layer0.attn.heads[1]:theirs.parts:{name}")
