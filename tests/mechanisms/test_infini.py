"""Infini-attention: the properties that tell a right implementation from the published wrong ones.

Each was broken by at least one public implementation: a memory with positions in it, a scrambled
head axis that leaks the future, kv heads tiled in the wrong order, padding that is written, state
in half precision, in buffers or nowhere.
"""

from __future__ import annotations

import pytest
import torch
from lone_infini import (
    LENGTHS,
    OFF,
    ON,
    VARIANTS,
    N,
    by_definition,
    llama,
    module,
    run,
    state_after,
    stream,
)
from tiny_models import in_chunks, part, swap, tiny, tokens

from mismatch.mechanisms.infini import Infini
from mismatch.mechanisms.parts.compressive import delta, linear, retrieve
from mismatch.mechanisms.parts.feature_maps import elu_plus_one
from mismatch.models.layout import Layout
from mismatch.models.private import same_memory

# the local path -------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "phi3"])
def test_one_segment_without_memory_is_the_original(family):
    model, ids = tiny(family), tokens(2, 20)
    student = swap(model, f"all:infini(segment=20, gate_init={OFF})").model
    torch.testing.assert_close(student(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", LENGTHS)
def test_without_memory_it_is_the_original_under_a_block_mask(length):
    model, ids = llama(), tokens(2, length)
    i = torch.arange(length)
    block = (i[:, None] >= i) & (i[:, None] // N == i // N)
    wanted = model(ids, attention_mask=block.expand(2, 1, -1, -1)).logits
    got = swap(model, f"all:infini(segment={N}, gate_init={OFF})").model(ids).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_local_attention_depends_on_relative_position_only():
    infini, x = module(gate_init=OFF), stream(2, 20)
    a, b = run(infini, x), run(infini, x, offset=37)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    crooked = run(infini, x, ids=2 * torch.arange(20)[None])
    assert (crooked - a).abs().max() > 1e-3, "the cos and sin that are handed down must matter"


@pytest.mark.parametrize("family", ["mistral_window", "gemma2", "qwen2"])
def test_the_modules_own_window_and_softcap_are_respected(family):
    """Windows of 6 to 9 tokens inside one segment of 32, and a softcap of 2, change the output."""
    model, ids = tiny(family), tokens(2, 32)
    student = swap(model, "all:infini(segment=32, first_segment=local)").model
    torch.testing.assert_close(student(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_scaling_is_the_modules():
    infini, x = module(gate_init=OFF), stream(1, N)
    before = run(infini, x)
    infini.scaling *= 3
    assert (run(infini, x) - before).abs().max() > 1e-3


# the definition ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_output_and_memory_are_those_of_the_definition(settings, length):
    infini, x = module(**settings), stream(2, length)
    heads, memory, norm = by_definition(infini, x)
    wanted = infini.project(heads.float())
    torch.testing.assert_close(run(infini, x), wanted, atol=2e-5, rtol=1e-4)
    state = state_after(infini, x).rows
    torch.testing.assert_close(state["memory"], memory.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state["norm"], norm.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_gradients_are_those_of_the_definition(settings):
    infini = module(dtype=torch.float64, **settings).requires_grad_(True)
    x = stream(1, 2 * N + 3, dtype=torch.float64).requires_grad_(True)
    weight = stream(1, 2 * N + 3, seed=5, dtype=torch.float64)
    heads = by_definition(infini, x)[0]
    names = ["gate", "q_proj.weight", "k_proj.weight", "v_proj.weight"]
    tensors = [x, *(infini.get_parameter(name) for name in names)]
    wanted = torch.autograd.grad((infini.project(heads) * weight).sum(), tensors)
    got = torch.autograd.grad((run(infini, x) * weight).sum(), tensors)
    for name, a, b in zip(["x", *names], got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_learned_maps_start_as_the_softmax_map_and_take_gradients():
    x = stream(2, 20)
    learned, fixed = module(feature_map="learned", moved=False), module(feature_map="softmax")
    assert torch.equal(run(learned, x), run(fixed, x))
    run(learned, x).pow(2).sum().backward()
    assert learned.map_q.grad.abs().sum() > 0
    assert learned.map_k.grad.abs().sum() > 0
    assert learned.map_q.shape == (4, 8, 8)
    assert learned.map_k.shape == (2, 8, 8)


# order and causality ----------------------------------------------------------------------


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("t", [3, N, 2 * N + 3])
def test_no_token_sees_a_later_one(settings, t):
    infini, x = module(**settings), stream(2, 30)
    y = x.clone()
    y[:, t:] += stream(2, 30, seed=9)[:, t:]
    a, b = run(infini, x), run(infini, y)
    torch.testing.assert_close(a[:, :t], b[:, :t], atol=1e-6, rtol=0)
    assert (a[:, t:] - b[:, t:]).abs().max() > 1e-2


def test_the_memory_is_read_before_it_is_written():
    infini, x = module(gate_init=ON, bias=False), stream(1, 3 * N)
    out = run(infini, x)
    assert torch.equal(out[:, :N], torch.zeros_like(out[:, :N])), "nothing is there to be read"
    y = x.clone()
    y[:, N + 2] += 1.0
    other = run(infini, y)
    same = [t for t in range(2 * N) if t != N + 2]
    torch.testing.assert_close(other[:, same], out[:, same], atol=1e-6, rtol=0)
    assert (other[:, 2 * N :] - out[:, 2 * N :]).abs().max() > 1e-3


# the first segment ---------------------------------------------------------------------------


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_finite_forward_and_backward_from_an_empty_memory(settings, scale):
    infini, x = module(**settings), (scale * stream(2, 2 * N + 1)).requires_grad_(True)
    out = run(infini, x)
    out.pow(2).mean().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in infini.parameters() if p.grad is not None)


def test_blend_keeps_the_papers_share_of_the_first_segment_and_local_all_of_it():
    x = stream(2, N)
    plain = run(module(gate_init=OFF, bias=False), x)
    torch.testing.assert_close(run(module(gate_init=0.0, bias=False), x), plain / 2)
    local = run(module(gate_init=0.0, bias=False, first_segment="local"), x)
    torch.testing.assert_close(local, plain)
    notes = module(gate_init=0.0).notes()
    assert any("the blend keeps 0.50 of local attention" in note for note in notes)
    assert module(first_segment="local").notes() == ()


# grouped heads ------------------------------------------------------------------------------


def test_query_head_h_uses_kv_head_h_over_group_in_both_paths():
    """Equal to the same module with one kv head per query head and repeated weights."""
    grouped, x = module(sinks=2), stream(2, 30)
    wide = tiny("llama", num_key_value_heads=4)
    attention = Layout.of(wide).blocks[1].self_attn
    for name in ("k_proj", "v_proj"):
        for kind in ("weight", "bias"):
            value = getattr(getattr(grouped, name), kind)
            repeated = value.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
            setattr(getattr(attention, name), kind, torch.nn.Parameter(repeated))
    attention.q_proj, attention.o_proj = grouped.q_proj, grouped.o_proj
    each = Infini(attention, grouped.settings, grouped.context).eval()
    each.gate, each.rotary = grouped.gate, grouped.rotary
    assert (each.n_kv_heads, grouped.n_kv_heads) == (4, 2)
    k = grouped.qkv(x)[1]
    assert (k[:, 0] - k[:, 1]).abs().max() > 0.1, "kv heads must differ for this to say anything"
    torch.testing.assert_close(run(grouped, x), run(each, x), atol=1e-5, rtol=0)


# no position in the memory -------------------------------------------------------------------


def test_the_memory_knows_no_position():
    infini, x = module(gate_init=ON), stream(2, 30)
    assert torch.equal(run(infini, x), run(infini, x, offset=1000))
    order = torch.cat(
        [torch.randperm(N, generator=torch.Generator().manual_seed(0)), torch.arange(N, 30)]
    )
    torch.testing.assert_close(
        run(infini, x[:, order])[:, N:], run(infini, x)[:, N:], atol=1e-5, rtol=0
    )


# the update rules --------------------------------------------------------------------


def pairs(segments, n, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v, q = (
        torch.randn(1, 2, segments, n, d, generator=generator, dtype=torch.float64)
        for _ in range(3)
    )
    return elu_plus_one(k), v, elu_plus_one(q)


def empty(d=6):
    return torch.zeros(1, 2, d, d, dtype=torch.float64), torch.zeros(1, 2, d, dtype=torch.float64)


def test_linear_rule_returns_a_weighted_mean_of_the_values():
    phi, v, q = pairs(4, 5)
    memories, norms = linear(phi, v, *empty())
    read = retrieve(q[:, :, 0], memories[:, :, -1], norms[:, :, -1])
    low, high = v.flatten(2, 3).amin(2, keepdim=True), v.flatten(2, 3).amax(2, keepdim=True)
    assert (read >= low - 1e-12).all()
    assert (read <= high + 1e-12).all()
    memories, norms = linear(phi, torch.full_like(v, 3.25), *empty())
    read = retrieve(q, memories[:, :, 1:], norms[:, :, 1:])
    torch.testing.assert_close(read, torch.full_like(read, 3.25))


@pytest.mark.parametrize("rule", [linear, delta])
def test_z_grows_and_counts_every_key(rule):
    phi, v, _ = pairs(5, 4)
    norms = rule(phi, v, *empty())[1]
    assert norms.shape == (1, 2, 6, 6)
    assert (norms[:, :, 1:] > norms[:, :, :-1]).all()
    torch.testing.assert_close(norms[:, :, -1], phi.sum((2, 3)))


def test_linear_memory_is_the_sum_over_all_complete_segments_however_they_are_cut():
    x = stream(2, 4 * N + 3)
    states = [
        state_after(module(segment=n), x[:, : 4 * N], c)
        for n, c in ((N, None), (4, [3, 29]), (2 * N, [4 * N]))
    ]
    for state in states[1:]:
        torch.testing.assert_close(
            state.rows["memory"], states[0].rows["memory"], atol=1e-5, rtol=1e-5
        )
    k, v = module().qkv(x)[1:]
    whole = elu_plus_one(k[:, :, : 4 * N]).transpose(-1, -2) @ v[:, :, : 4 * N]
    torch.testing.assert_close(states[0].rows["memory"], whole, atol=1e-5, rtol=1e-5)


def test_delta_rule_leaves_a_known_pair_alone_and_halves_what_it_reads():
    """The paper's claim holds for the second write of M, not for what is read: z goes on
    growing."""
    phi, v, _ = pairs(1, 1)
    again = (x.expand(-1, -1, 3, -1, -1) for x in (phi, v))
    memories, norms = delta(*again, *empty())
    torch.testing.assert_close(memories[:, :, 2], memories[:, :, 1], atol=1e-12, rtol=0)
    ratio = retrieve(phi.expand(-1, -1, 3, -1, -1), memories[:, :, 1:], norms[:, :, 1:]) / v
    wanted = torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(ratio.mean((0, 1, 3, 4)), wanted)


def test_delta_rule_does_change_the_memory_when_several_keys_are_written_again():
    phi, v, _ = pairs(1, 4)
    memories, _ = delta(*(x.expand(-1, -1, 2, -1, -1) for x in (phi, v)), *empty())
    assert (memories[:, :, 2] - memories[:, :, 1]).abs().max() > 0.1 * memories[:, :, 1].abs().max()


# the gate --------------------------------------------------------------------------------


def test_one_gate_per_query_head_from_local_to_memory():
    infini, x = module(bias=False), stream(1, 3 * N)
    assert infini.gate.shape == (4,)

    def at(value):
        with torch.no_grad():
            infini.gate.fill_(value)
        return run(infini, x)

    local, memory = at(OFF), at(ON)
    for beta in (-2.0, 0.0, 1.5):
        share = torch.sigmoid(torch.tensor(beta))
        wanted = share * memory + (1 - share) * local
        torch.testing.assert_close(at(beta), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_the_loss_of_the_last_segment_reaches_the_first_through_the_memory(rule):
    def gradient(gate):
        infini = module(gate_init=gate, update=rule)
        x = stream(1, 3 * N).requires_grad_(True)
        run(infini, x)[:, 2 * N :].pow(2).sum().backward()
        return x.grad[:, :N].abs().sum()

    assert gradient(0.0) > 1e-3
    assert gradient(OFF) == 0


def test_gradcheck_of_the_gate():
    infini, x = module(dtype=torch.float64), stream(1, 2 * N + 1, dtype=torch.float64)

    def output(gate):
        return torch.func.functional_call(
            infini,
            {"gate": gate},
            (),
            {
                "hidden_states": x,
                "position_embeddings": infini.rotary(x, torch.arange(x.shape[1])[None]),
            },
        )[0]

    assert torch.autograd.gradcheck(output, infini.gate.detach().clone().requires_grad_(True))


# sinks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [1, 3, N, 2 * N + 3])
def test_sinks_stay_visible_to_every_later_segment(sinks):
    model, ids = llama(), tokens(2, 4 * N + 2)
    i = torch.arange(ids.shape[1])
    block = (i[:, None] >= i) & ((i[:, None] // N == i // N) | (i < sinks))
    wanted = model(ids, attention_mask=block.expand(2, 1, -1, -1)).logits
    student = swap(model, f"all:infini(segment={N}, sinks={sinks}, gate_init={OFF})").model
    torch.testing.assert_close(student(ids).logits, wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(in_chunks(student, ids, 5), wanted, atol=1e-4, rtol=0)


def test_inherited_and_new_parameters():
    student = swap(llama(), "layer1:infini")
    clause = student.plan.clauses[0]
    assert clause.new_parameters == {"gate": 4}
    assert clause.dropped == {}
    theirs = dict(Layout.of(llama()).blocks[1].self_attn.named_parameters())
    assert clause.inherited.keys() == theirs.keys()
    mine = part(student)
    assert all(same_memory(mine.get_parameter(name), p) for name, p in theirs.items())
