"""What Infini-attention can have beyond the paper: overlap, a shared denominator, maps of its own, far queries.

Output, state and gradients against the plain definition stand in test_infini.py, over `VARIANTS`.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from lone_infini import FULL, OFF, ON, N, llama, module, run, state_after, stream
from tiny_models import in_chunks, part, positions, swap, tiny, tokens
from transformers import DynamicCache, StaticCache

from mismatch.errors import SpecError, SurgeryError
from mismatch.mechanisms.base import Context
from mismatch.mechanisms.parts.feature_maps import elu_plus_one
from mismatch.mechanisms.parts.rotary import FixedTurn

WHOLE = (
    f"infini(segment={N}, overlap=1, normalizer=shared, feature_map=hedgehog, memory_position=far"
)


def trained(text: str):
    """A student whose new tensors are no longer what they were born as."""
    student = swap(llama(), text)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for clause in student.plan.clauses:
            for name in clause.new_parameters:
                tensor = student.model.get_submodule(clause.path).get_parameter(name)
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return student.model


# the paper's own form ----------------------------------------------------------------------------


def test_without_options_every_bit_is_that_of_the_published_form():
    infini, x = module(), stream(2, 3 * N)
    q, k, v = infini.qkv(x)
    q_rot, k_rot = infini.rotate(q, k, infini.rotary(x, torch.arange(3 * N)[None]))
    q, k, v, q_rot, k_rot = (part.unflatten(2, (3, N)) for part in (q, k, v, q_rot, k_rot))
    near = [part.transpose(1, 2).flatten(0, 1) for part in (q_rot, k_rot, v)]
    near[1:] = [part.repeat_interleave(2, 1) for part in near[1:]]
    local = F.scaled_dot_product_attention(*near, is_causal=True, scale=infini.scaling)
    local = local.unflatten(0, (2, 3)).transpose(1, 2)
    phi_q, phi_k = elu_plus_one(q).unflatten(1, (2, 2)), elu_plus_one(k)
    memory, norm = torch.zeros(2, 2, 1, 8, 8), torch.zeros(2, 2, 1, 8)
    memory = torch.cat([memory, phi_k.transpose(-1, -2) @ v], 2).cumsum(2)[:, :, None, :3]
    norm = torch.cat([norm, phi_k.sum(-2)], 2).cumsum(2)[:, :, None, :3]
    weight = phi_q @ norm[..., None]
    read = ((phi_q @ memory) / weight.masked_fill(weight == 0, 1.0)).flatten(1, 2)
    gate = torch.sigmoid(infini.gate)[None, :, None, None, None]
    heads = gate * read + (1 - gate) * local
    assert torch.equal(run(infini, x), infini.project(heads.flatten(2, 3)))


# overlap -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [1, 2])
@pytest.mark.parametrize("sinks", [0, 3, N + 3])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma2"])
def test_without_memory_it_is_the_original_under_a_mask_of_several_segments(family, sinks, overlap):
    """And under the module's own window, which the mask of the model has in it (7 and 9 tokens)."""
    model, ids = tiny(family), tokens(2, 4 * N + 3)
    length = ids.shape[1]
    i = torch.arange(length)
    behind = (i[:, None] // N - i // N) > overlap
    window = {"mistral_window": 7, "gemma2": 9}.get(family, length)
    near = ~behind & (i[:, None] - i < window)
    mask = (i[:, None] >= i) & (near | (behind & (i < sinks)))
    layer = 0 if family == "gemma2" else 1  # of gemma2's layers every second has the window
    text = f"infini(segment={N}, overlap={overlap}, sinks={sinks}, gate_init={OFF})"
    student = swap(model, f"layer{layer}:{text}").model

    def masked(_module, args, kwargs):
        dtype = torch.finfo(torch.float32).min
        given = torch.where(mask, 0.0, dtype).expand(2, 1, -1, -1)
        return args, {**kwargs, "attention_mask": given}

    attention = model.model.layers[layer].self_attn
    handle = attention.register_forward_pre_hook(masked, with_kwargs=True)
    wanted = model(ids).logits
    handle.remove()
    torch.testing.assert_close(student(ids).logits, wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(in_chunks(student, ids, 5), wanted, atol=1e-4, rtol=0)


def test_a_segment_enters_the_memory_when_the_softmax_has_left_it_behind():
    infini, x = module(gate_init=ON, overlap=1, bias=False), stream(1, 4 * N)
    out = run(infini, x)
    assert torch.equal(out[:, : 2 * N], torch.zeros_like(out[:, : 2 * N])), "nothing is there"
    y = x.clone()
    y[:, 2 * N - 1] += 1.0
    other = run(infini, y)
    torch.testing.assert_close(other[:, 2 * N : 3 * N], out[:, 2 * N : 3 * N], atol=1e-6, rtol=0)
    assert (other[:, 3 * N :] - out[:, 3 * N :]).abs().max() > 1e-3


def test_while_the_memory_is_empty_local_attention_is_whole_or_blended():
    x = stream(2, 2 * N)
    plain = run(module(overlap=1, gate_init=OFF, bias=False), x)
    local = module(overlap=1, first_segment="local", bias=False, gate_init=0.0)
    torch.testing.assert_close(run(local, x), plain)
    blend = module(overlap=1, bias=False, gate_init=0.0)
    torch.testing.assert_close(run(blend, x), plain / 2)
    assert "first 2 segments: the memory is empty" in blend.notes()[0]
    assert local.notes() == ()


# one denominator ---------------------------------------------------------------------------------


def test_a_shared_denominator_needs_no_gate_where_the_memory_is_empty():
    model, ids = llama(), tokens(2, 2 * N)
    student = swap(model, f"all:{WHOLE})").model
    torch.testing.assert_close(student(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("gate", [-1e4, 1e4])
def test_weights_that_no_exponential_can_hold_select_a_branch(gate):
    x = stream(1, 3 * N + 2).requires_grad_(True)
    infini = module(normalizer="shared", gate_init=gate, moved=False)
    out = run(infini, x)
    with infini.branches()["memory" if gate < 0 else "local"]:
        torch.testing.assert_close(run(infini, x)[:, N:], out[:, N:])
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_branches_add_up_and_there_is_no_gate_to_weigh_them():
    infini, x = module(**FULL, bias=False), stream(2, 4 * N)
    whole, parts = run(infini, x), []
    for out in infini.branches().values():
        with out:
            parts.append(whole - run(infini, x))
    torch.testing.assert_close(sum(parts), whole, atol=1e-5, rtol=0)
    assert infini.gates() == {}
    assert module().gates().keys() == {"memory"}
    assert all((part[:, 2 * N :].abs().amax() > 1e-3) for part in parts)


def test_under_one_denominator_sinks_are_not_written():
    x = stream(1, 3 * N)
    with_sinks = state_after(module(normalizer="shared", sinks=3), x).rows["norm"]
    k = module().qkv(x)[1]
    torch.testing.assert_close(with_sinks, elu_plus_one(k[:, :, 3:]).sum(2), atol=1e-5, rtol=1e-5)
    assert (state_after(module(sinks=3), x).rows["norm"] > with_sinks).all(), "the paper's are"


def test_a_sink_can_be_restored_for_a_while():
    infini, x = module(**FULL), stream(1, 4 * N)
    plain, sunk = run(infini, x), run(module(**FULL, sinks=1), x)
    with infini.restores()["first_token"]:
        torch.testing.assert_close(run(infini, x), sunk)
    assert torch.equal(run(infini, x), plain)


# maps and positions of its own -------------------------------------------------------------------


def test_hedgehog_begins_as_the_learned_map_and_takes_gradients():
    x = stream(2, 20)
    learned = module(feature_map="learned", moved=False)
    own = module(feature_map="hedgehog", moved=False)
    assert torch.equal(run(own, x), run(learned, x))
    run(own, x).pow(2).sum().backward()
    for name in ("map_q", "map_k", "own_q", "own_k"):
        assert own.get_parameter(name).grad.abs().sum() > 0
    assert own.own_q.shape == (32, 24)
    assert own.own_k.shape == (16, 24)


def test_new_parameters_of_the_whole():
    clause = swap(llama(), f"layer1:{WHOLE})").plan.clauses[0]
    sizes = {"gate": 4, "gate_x": 96, "map_q": 256, "map_k": 128, "own_q": 768, "own_k": 384}
    assert clause.new_parameters == sizes
    assert clause.dropped == {}


ROTATED = (
    "llama", "mistral", "qwen3", "qwen3_5", "gemma2", "gemma3", "gemma4", "olmo2", "olmo3", "phi3", "gpt_neox",
    "smollm3",
)  # fmt: skip
SCALED = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


def turned(model, layer, distance):
    """cos and sin as `FixedTurn` and as the model makes them."""
    context = Context(layer, "attn", 3, 24, model.config)
    rotary = getattr(model, model.base_model_prefix).rotary_emb
    x, at = torch.zeros(1, 1, 24), torch.tensor([[distance]])
    kinds = getattr(model.config, "layer_types", None)
    several = model.config.model_type in ("gemma3_text", "gemma4_text", "olmo3")
    theirs = rotary(x, at, kinds[layer]) if several else rotary(x, at)
    return FixedTurn(context, distance)(theirs[0]), theirs


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", ROTATED)
def test_far_queries_are_turned_by_the_layers_own_frequencies(family, layer):
    for own, theirs in zip(*turned(tiny(family), layer, 37), strict=True):
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", SCALED)
def test_far_queries_follow_the_models_own_scaling(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, **SCALED[kind]}
    own, theirs = turned(tiny("llama", rope_parameters=rope), 1, 37)
    factor = torch.hypot(theirs[0], theirs[1])  # of YaRN: a length, not a rotation
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b / factor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family, layer", [("gpt2", 0), ("smollm3", 1)])
def test_far_is_refused_where_nothing_is_rotated_before_weights_are_there(family, layer):
    with torch.device("meta"):
        model = tiny(family)
    text = f"layer{layer}:infini(memory_position=far)"
    with pytest.raises(SurgeryError, match="has no rotary embedding to turn the memory's queries"):
        swap(model, text)


def test_far_queries_know_no_position_of_their_own():
    infini, x = module(gate_init=ON, memory_position="far"), stream(2, 30)
    assert torch.equal(run(infini, x), run(infini, x, offset=1000))
    assert (run(infini, x) - run(module(gate_init=ON), x))[:, N:].abs().max() > 1e-2


# the state ---------------------------------------------------------------------------------------

STATES = [
    {"overlap": 1}, {"overlap": 3, "sinks": 2, "update": "delta"}, FULL, {**FULL, "sinks": 3},
    {"slots": (4, 1), "slot_score": "value_norm"},
    {**FULL, "sinks": 1, "slots": 5, "slot_score": "recall_error"},
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 7, N, N + 1, 3 * N])
@pytest.mark.parametrize("settings", STATES, ids=str)
def test_fed_in_pieces_it_is_the_whole(settings, size):
    infini, x = module(**settings), stream(2, 50)
    cache = DynamicCache()
    pieces = [run(infini, x[:, s : s + size], s, cache) for s in range(0, 50, size)]
    torch.testing.assert_close(torch.cat(pieces, 1), run(infini, x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [40, 1, 7])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_counted_nor_written_nor_read(side, size):
    student = trained(f"layer1:{WHOLE}, sinks=3)")
    length, pads = 40, (0, 3, N, 13)
    real, mask = tokens(4, length), torch.zeros(4, length, dtype=torch.long)
    batch = torch.zeros_like(real)
    for row, pad in enumerate(pads):
        place = slice(pad, None) if side == "left" else slice(0, length - pad)
        batch[row, place] = real[row, : length - pad]
        mask[row, place] = 1
    padded = in_chunks(student, batch, size, mask)
    cache = DynamicCache(config=student.config)
    student(batch, attention_mask=mask, position_ids=positions(mask), past_key_values=cache)
    for row, pad in enumerate(pads):
        alone = DynamicCache(config=student.config)
        wanted = student(real[row : row + 1, : length - pad], past_key_values=alone).logits[0]
        torch.testing.assert_close(padded[row][mask[row] == 1], wanted, atol=1e-4, rtol=0)
        for name in ("memory", "norm", "sink_k", "earlier_v"):
            a, b = cache.layers[1].rows[name][row], alone.layers[1].rows[name][0]
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("prompt", [5, 2 * N, 2 * N + 3])
@pytest.mark.parametrize("layer", ["layer0", "all"])
def test_generate_equals_the_full_forward(layer, prompt):
    student = trained(f"{layer}:{WHOLE}, sinks=2)")
    out = student.generate(
        tokens(2, prompt), max_new_tokens=3 * N + 2, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    full = student(out.sequences).logits[:, prompt - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), full, atol=1e-3, rtol=0)


def test_in_a_static_cache_it_is_the_whole():
    student = trained(f"layer1:{WHOLE})")
    cache, ids = StaticCache(config=student.config, max_cache_len=40), tokens(1, 29)
    cuts = (0, 6, 7, 20, 29)
    pieces = [student(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(pieces, 1), student(ids).logits, atol=1e-4, rtol=0)


def test_the_state_is_of_the_size_that_the_card_names_and_keeps_no_view():
    infini = module(**FULL, sinks=2)
    short, long = (state_after(infini, stream(1, n)).rows for n in (3 * N - 1, 13 * N - 1))
    assert {k: v.shape for k, v in short.items()} == {k: v.shape for k, v in long.items()}
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in long.values())
    kv, d = 2, 8
    memory, near, opened, sinks = 16 * d + 16, 3 * N * d, 3 * (N - 1) * d, 2 * 2 * d
    assert sum(x.numel() for x in long.values()) == kv * (memory + near + opened + sinks)


def test_memory_is_at_least_float32_and_the_output_is_of_the_model():
    infini = module(dtype=torch.bfloat16, **FULL)
    x = stream(1, 4 * N, dtype=torch.bfloat16)
    rows = state_after(infini, x).rows
    assert rows["memory"].dtype == rows["norm"].dtype == torch.float32
    assert rows["earlier_k"].dtype == run(infini, x).dtype == torch.bfloat16
    wide = module(**FULL)
    torch.testing.assert_close(run(infini, x).float(), run(wide, x.float()), atol=0.2, rtol=0.1)


def test_the_plan_names_a_window_that_is_narrower_than_what_local_attention_reads():
    student = swap(tiny("mistral_window"), "layer1:infini(segment=4, overlap=1)")
    assert any("own window of 7 tokens" in note for note in part(student).notes())
    student = swap(tiny("mistral_window"), "layer1:infini(segment=4)")
    assert not any("own window" in note for note in part(student).notes())


# slots -------------------------------------------------------------------------------------------


def test_slots_for_all_far_tokens_are_softmax_attention_where_the_memory_is_not_read():
    model, ids = llama(), tokens(2, 4 * N + 3)
    text = f"all:infini(segment={N}, slots=40, slot_score=recall_error, sinks=2, gate_init={OFF})"
    student = swap(model, text).model
    torch.testing.assert_close(student(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(in_chunks(student, ids, 5), model(ids).logits, atol=1e-4, rtol=0)


def test_the_memory_holds_what_the_slots_hold():
    x = stream(1, 4 * N)
    a, b = (state_after(module(**s), x).rows for s in ({}, {"slots": 4, "slot_score": "first"}))
    assert torch.equal(a["norm"], b["norm"])
    assert torch.equal(a["memory"], b["memory"])


def test_what_the_memory_recalls_badly_is_kept():
    """Of segments that say one thing over and over, the token that says another."""
    infini, x = module(slots=1, slot_score="recall_error"), stream(1, 1).repeat(1, 4 * N, 1)
    x[:, 2 * N + 3] += 5.0
    cache = DynamicCache()
    run(infini, x[:, : 2 * N], 0, cache)
    first = cache.layers[1].rows["slot_v"].clone()  # an empty memory recalls no value
    run(infini, x[:, 2 * N :], 2 * N, cache)
    v = infini.qkv(x)[2]
    torch.testing.assert_close(first, v[:, :, 0:1].flatten(1, 2), atol=1e-5, rtol=1e-5)
    assert (v[0, :, 2 * N + 3].norm(dim=-1) > v[0, :, 0].norm(dim=-1)).all()
    wanted = v[:, :, 2 * N + 3 : 2 * N + 4].flatten(1, 2)
    torch.testing.assert_close(cache.layers[1].rows["slot_v"], wanted, atol=1e-5, rtol=1e-5)


def test_learned_scores_are_new_and_say_that_they_are_untrained():
    student = swap(llama(), f"layer1:infini(segment={N}, slots=3)")
    assert any("untrained and tie" in note for note in part(student).notes())
    assert sum(n.startswith("choice.net.") for n in student.plan.clauses[0].new_parameters) == 4
    assert part(student).score_net() is part(student).choice.net
    assert module(slots=3, slot_score="recall_error").score_net() is None
    assert module().score_net() is None
    x = stream(2, 4 * N)
    rotation = module().rotary(x, torch.arange(4 * N)[None])
    targets = module(slots=3, sinks=2).score_targets(x, position_embeddings=rotation)
    assert targets.shape == (2, 4 * N, 2)
    assert targets[:, 2 : 3 * N].isfinite().all()
    assert targets[:, :2].isnan().all()


def test_slots_that_do_not_fit_are_refused():
    with pytest.raises(SpecError, match="`slots` has 3 numbers, and the module has 2 kv heads"):
        swap(llama(), "layer1:infini(slots=[1, 2, 3])")
    with pytest.raises(SpecError, match="chooses far tokens, and there are no slots for them"):
        swap(llama(), "layer1:infini(slot_score=recall_error)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"feature_map": "softmax", "sinks": 3}, {"overlap": 2, "slots": (5, 1)}, FULL,
        {**FULL, "sinks": 2, "slots": 4, "slot_score": "recall_error"},
    ],
    ids=str,
)  # fmt: skip
def test_the_bytes_of_the_state_are_those_that_a_cache_holds(settings, dtype):
    infini = module(dtype=dtype, **settings)
    rows = state_after(infini, stream(1, 6 * N - 1, dtype=dtype)).rows
    assert infini.state_bytes() == sum(x.numel() * x.element_size() for x in rows.values())
