"""topk and moba: which keys a query reads, by loops over tokens, whatever pads stand before them."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import in_chunks, part, positions, swap, tiny, tokens

from mismatch.errors import SpecError, SurgeryError
from mismatch.mechanisms.parts import host_softmax

IDS = tokens(2, 23)


def best(pairs, count):
    """The `count` numbers of largest score."""
    return {j for _, j in sorted(pairs, reverse=True)[:count]}


def topk(q, k, i, first, count):
    return best([(float(q[i] @ k[j]), j) for j in range(first, i + 1)], count)


def moba(q, k, i, _first, size, top):
    own, scores = i // size, []
    for block in range(own):
        mean = sum(k[j] for j in range(block * size, (block + 1) * size)) / size
        scores.append((float(q[i] @ mean), block))
    blocks = best(scores, top - 1) | {own}
    return {j for j in range(i + 1) if j // size in blocks}


def by_loops(attention, x, angles, choose):
    """The attention's output for one text, one query of one head at a time."""
    q, k, v = attention.qkv(x)
    q, k = attention.rotate(q, k, angles)
    heads = torch.zeros(x.shape[0], attention.n_heads, x.shape[1], v.shape[-1])
    for b in range(x.shape[0]):
        for h in range(attention.n_heads):
            kv = h // (attention.n_heads // attention.n_kv_heads)
            for i in range(x.shape[1]):
                first = 0 if attention.window is None else max(0, i - attention.window + 1)
                reads = sorted(choose(q[b, h], k[b, kv], i, first))
                scores = k[b, kv, reads] @ q[b, h, i] * attention.scaling
                if attention.softcap is not None:
                    scores = attention.softcap * torch.tanh(scores / attention.softcap)
                heads[b, h, i] = scores.softmax(0) @ v[b, kv, reads]
    return attention.project(heads, x)


CASES = [
    *(("topk(k=5)", f, lambda *a: topk(*a, 5)) for f in (
        "llama", "gpt2", "gpt_neox", "gemma2", "qwen3", "mistral_window", "qwen3_5"
    )),
    ("topk(k=1)", "llama", lambda *a: topk(*a, 1)),
    *(("moba(block=4, top=3)", f, lambda *a: moba(*a, 4, 3)) for f in (
        "llama", "gpt2", "gpt_neox", "gemma2", "qwen3"
    )),
    ("moba(block=5, top=1)", "llama", lambda *a: moba(*a, 5, 1)),
    ("moba(block=1, top=4)", "llama", lambda *a: moba(*a, 1, 4)),
]  # fmt: skip


@pytest.mark.parametrize("call, family, choose", CASES, ids=[f"{c}-{f}" for c, f, _ in CASES])
@torch.no_grad()
def test_it_is_what_loops_over_tokens_choose(call, family, choose, monkeypatch):
    """Seven queries at a time, so that a text is worked on in pieces."""
    monkeypatch.setattr(host_softmax, "QUERIES", 7)
    student, seen = swap(tiny(family), f"layer1:{call}"), {}
    attention = part(student)

    def look(_module, args, kwargs):
        seen.update(x=args[0] if args else kwargs["hidden_states"], **kwargs)

    attention.register_forward_pre_hook(look, with_kwargs=True)
    outputs = []
    attention.register_forward_hook(lambda _m, _a, out: outputs.append(out[0]))
    student.model(IDS, use_cache=False)
    wanted = by_loops(attention, seen["x"], seen.get("position_embeddings"), choose)
    torch.testing.assert_close(outputs[0], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("call", ["topk(k=5)", "moba(block=4, top=2)"])
def test_gradients_are_those_of_the_attention_over_what_was_chosen(call):
    """By a mask of the same choice, given to the teacher."""
    model = tiny("mistral").requires_grad_(True)
    student = swap(model, f"layer1:{call}").model
    attention, kept = student.get_submodule("model.layers.1.self_attn"), []
    choose = attention.chosen
    attention.chosen = lambda *a: kept.append(choose(*a)) or kept[-1]
    student(IDS, use_cache=False).logits.square().mean().backward()
    masked = swap(model, "layer1:ring").model  # the same projections, as one attention
    other = masked.get_submodule("model.layers.1.self_attn")

    def forward(hidden_states, position_embeddings, **_):
        q, k, v = other.qkv(hidden_states)
        q, k = other.rotate(q, k, position_embeddings)
        scores = q @ other.per_query_head(k).mT * other.scaling
        weights = scores.masked_fill(~kept[0], -math.inf).softmax(-1)
        return other.project(weights @ other.per_query_head(v)), None

    other.forward = forward
    masked(IDS, use_cache=False).logits.square().mean().backward()
    for one, two in zip(student.parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-5, rtol=1e-4)


def test_no_choice_of_as_many_keys_keeps_more_of_the_weights():
    """The oracle, beside a window of the same number of keys: nearer to the teacher at every budget."""
    model = tiny("llama")
    for k in (2, 4, 8):
        off = [
            (swap(model, f"layer1:{call}").model(IDS).logits - model(IDS).logits).square().mean()
            for call in (f"topk(k={k})", f"sliding_window(window={k})")
        ]
        assert off[0] < off[1]


@pytest.mark.parametrize(
    "family, call",
    [
        *((f, "moba(block=3, top=2)") for f in ("llama", "gemma2", "gpt2")),
        *((f, "topk(k=4)") for f in ("gpt2", "gemma2", "mistral_window", "phi3")),
    ],
)
def test_tokens_are_counted_from_the_first_real_one(family, call):
    student = swap(tiny(family), f"layer1:{call}").model
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    for size in (23, 5, 1):
        padded = in_chunks(student, IDS.masked_fill(mask == 0, 0), size, mask)
        torch.testing.assert_close(padded[:1, 7:], student(IDS[:1, 7:]).logits, atol=1e-4, rtol=0)
    whole = student(IDS, attention_mask=mask, position_ids=positions(mask)).logits
    torch.testing.assert_close(whole[mask == 1], padded[mask == 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("call", ["topk(k=4)", "moba(block=3, top=2)"])
def test_in_some_heads(call):
    model = tiny("llama")
    whole, every = (swap(model, f"layer1{heads}:{call}").model for heads in ("", ".heads[0-3]"))
    torch.testing.assert_close(every(IDS).logits, whole(IDS).logits, atol=1e-5, rtol=0)
    some = swap(model, f"layer1.heads[0,3]:{call}").model
    assert (some(IDS).logits - whole(IDS).logits).abs().max() > 1e-3
    torch.testing.assert_close(in_chunks(some, IDS, 5), some(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("call", ["topk(k=0)", "moba(block=0)", "moba(top=0)"])
def test_rubbish_is_refused(call):
    with pytest.raises(SpecError, match="must be int >= 1, got 0"):
        swap(tiny("llama"), f"layer1:{call}")


@pytest.mark.parametrize("family", ["mistral_window", "phi3"])
def test_blocks_of_a_layer_that_drops_them_are_refused(family):
    with pytest.raises(
        SurgeryError,
        match=r"chooses among all older blocks, and this module reads the last \d tokens",
    ):
        swap(tiny(family), "layer1:moba")
