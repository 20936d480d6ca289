"""The controls do exactly what they say: they bound the scale of everything else."""

from __future__ import annotations

import pytest
import torch
from tiny_models import in_chunks, part, swap, tiny, tokens
from transformers import DynamicCache

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context
from mismatch.mechanisms.mean import Mean, MeanConfig, OutputMean
from mismatch.models.layout import Layout

FAMILIES = ("llama", "gemma3", "gpt2", "gpt_neox")


def output_of(student, ids, layer=1, slot="attn"):
    """What the part in a slot hands to its host."""
    seen = []
    hook = part(student, layer, slot).register_forward_hook(lambda m, a, out: seen.append(out))
    student.model(ids)
    hook.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("slot", ["attn", "mlp", "norm1", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_is_zeros_and_the_cache_is_the_teachers(family, slot):
    model, ids = tiny(family), tokens(2, 12)
    student = swap(model, f"layer1.{slot}:zero")
    out = output_of(student, ids, slot=slot)
    assert torch.equal(out, torch.zeros_like(out))
    assert out.shape == (2, 12, 24)
    mine, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)
    student.model(ids, past_key_values=mine, use_cache=True)
    model(ids, past_key_values=theirs, use_cache=True)
    assert torch.equal(mine.layers[0].keys, theirs.layers[0].keys)
    assert mine.get_seq_length(1) == 12


def test_zero_attention_adds_nothing_to_the_stream():
    model = tiny("llama")
    block = swap(model, "layer1:zero").layout.blocks[1]
    x = torch.randn(2, 12, 24)
    out = block(x, position_embeddings=model.model.rotary_emb(x, torch.arange(12)[None]))
    torch.testing.assert_close(out, x + block.mlp(block.post_attention_layernorm(x)))


@pytest.mark.parametrize("slot", ["attn", "mlp", "norm2", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mean_is_the_calibration_mean_over_bulk_tokens_at_every_position(family, slot):
    model = tiny(family)
    student = swap(model, f"layer1.{slot}:mean")
    out = output_of(student, tokens(2, 12), slot=slot)
    assert (out == out[0, 0]).all()
    # `swap` calibrates on these tokens; tiny models have no massive ones, so bulk = not position 0
    text = tokens(2, 24, seed=99)
    teacher = swap(model, f"layer1.{slot}:identity")
    wanted = output_of(teacher, text, slot=slot)[:, 1:].double().mean((0, 1)).float()
    torch.testing.assert_close(out[0, 0], wanted, atol=1e-6, rtol=1e-5)


def test_mean_of_batches_is_the_mean_of_the_whole():
    x, keep = torch.randn(6, 10, 4), torch.rand(6, 10) > 0.3
    whole, parts = OutputMean(), OutputMean()
    whole.update(x, x, keep)
    for rows in ([0], [1, 2, 3], [4, 5]):
        parts.update(x[rows], x[rows], keep[rows])
    torch.testing.assert_close(whole.mean(), x[keep].double().mean(0))
    torch.testing.assert_close(parts.mean(), whole.mean())


def test_mean_without_calibration_is_refused():
    attn = Layout.of(tiny("llama")).blocks[1].self_attn
    context = Context(1, "attn", 3, 24, None)
    with pytest.raises(SurgeryError, match=r"`mean` at layer1\.attn is built from a calibration"):
        Mean(attn, MeanConfig(), context)
    context.calibration = OutputMean()
    with pytest.raises(SurgeryError, match="no usable token"):
        Mean(attn, MeanConfig(), context)


@pytest.mark.parametrize("family", FAMILIES)
def test_skip_leaves_the_layer_out(family):
    model, ids = tiny(family), tokens(2, 12)
    seen = {}
    layout = Layout.of(model)
    hook = layout.blocks[1].register_forward_pre_hook(
        lambda m, a, k: seen.update(x=a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    model(ids)
    hook.remove()
    assert torch.equal(output_of(swap(model, "layer1:skip"), ids, slot="block"), seen["x"])


@pytest.mark.parametrize("slot", ["attn", "mlp", "block", "norm1"])
def test_random_keeps_mean_and_std_of_every_tensor_and_nothing_else(slot):
    model = tiny("llama", hidden_size=96, intermediate_size=128)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1)
    student = swap(model, f"layer1.{slot}:random")
    theirs = dict(model.get_submodule(student.layout.slot_path(1, slot)).named_parameters())
    mine = dict(part(student, slot=slot).original.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, old in theirs.items():
        n = old.numel()
        assert abs(mine[name].mean() - old.mean()) < 5 * old.std() / n**0.5, name
        assert abs(mine[name].std() / old.std() - 1) < 4 / n**0.5, name
        both = torch.stack([mine[name].flatten(), old.flatten()])
        assert abs(torch.corrcoef(both)[0, 1]) < 5 / n**0.5, name
    assert sum(student.plan.clauses[0].inherited.values()) == 0


def test_random_draws_depend_on_seed_and_place_only():
    model = tiny("llama")

    def weight(text, layer=1, seed=0):
        return part(swap(model, text, seed), layer).original.q_proj.weight

    first = weight("layer1:random")
    assert torch.equal(weight("layer1:random"), first)
    assert not torch.equal(weight("layer1:random(seed=1)"), first)
    assert not torch.equal(weight("layer1:random", seed=1), first)
    assert not torch.equal(weight("layers[1,2]:random", layer=2), first)


def test_a_wrapper_answers_for_what_it_wraps():
    student = swap(tiny("llama"), "layer1:identity")
    assert part(student).layer_idx == 1
    assert part(student).q_proj is part(student).original.q_proj
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = part(student).no_such_thing


# parallel ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_is_the_sum_of_both_paths(family):
    model, ids = tiny(family), tokens(2, 20)
    # Layer 0: both students see the same input there.
    both = output_of(swap(model, "layer0:parallel(infini(segment=8), alpha=0.25)"), ids, 0)
    teacher = output_of(swap(model, "layer0:identity"), ids, 0)
    inner = output_of(swap(model, "layer0:infini(segment=8)"), ids, 0)
    torch.testing.assert_close(both, teacher + 0.25 * inner, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "inner",
    [
        "infini(segment=8)",
        "sliding_window(window=4)",
        "random",
        "parallel(infini(segment=8), alpha=1)",
        "identity",
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_paths_keep_their_states_apart(family, inner):
    model, ids = tiny(family), tokens(2, 20)
    student = swap(model, f"layer0:parallel({inner}, alpha=0.5)").model
    torch.testing.assert_close(in_chunks(student, ids, 6), student(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_around_a_block_keeps_the_states_of_both_apart(family):
    model, ids = tiny(family), tokens(2, 20)
    student = swap(model, "layer0.block:parallel(random, alpha=0.5)").model
    torch.testing.assert_close(in_chunks(student, ids, 6), student(ids).logits, atol=1e-4, rtol=0)


def test_parallel_on_top_of_a_replacement():
    model, ids = tiny("llama"), tokens(2, 20)
    student = swap(model, "layer0:infini(segment=8); layer0:parallel(random, alpha=0.5)").model
    torch.testing.assert_close(in_chunks(student, ids, 6), student(ids).logits, atol=1e-4, rtol=0)


def test_parallel_takes_gradients_into_alpha_even_at_zero():
    model, ids = tiny("llama").requires_grad_(True), tokens(2, 20)
    student = swap(model, "layer1:parallel(infini(segment=8))")
    student.model(ids).logits.pow(2).mean().backward()
    assert part(student).alpha.grad.abs() > 0
    clause = student.plan.clauses[0]
    assert set(clause.new_parameters) == {"alpha", "inner.gate"}
    assert clause.dropped == {}


def test_parallel_refuses_a_cache_that_was_written_without_it():
    model, ids = tiny("llama"), tokens(1, 6)
    student = swap(model, "layer1:parallel(random)").model
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(SurgeryError, match=r"layer 1 of this cache .* without `parallel`"):
        student(ids, past_key_values=cache, use_cache=True)
