"""The state of the mixers: the same output however a text is fed, batched, padded or beamed."""

from __future__ import annotations

import pytest
import torch
from lone_mixers import CALLS, NAMES, gen, lone, name_of, rows_after, run, stream
from tiny_models import in_chunks, part, positions, swap, tiny, tokens
from transformers import DynamicCache

from mismatch.mechanisms.parts.mixers import States
from mismatch.registry import mechanisms


@pytest.mark.parametrize("call", CALLS)
def test_fed_in_pieces_it_is_the_whole_and_so_is_its_state(call):
    mixer, x = lone(call), stream(2, 70)
    with torch.no_grad():
        whole, rows = rows_after(mixer, x)
        for sizes in ([1] * 70, [1, 2, 67], [64, 6], [3, 1, 1, 40, 25]):
            cache, out = DynamicCache(), []
            for piece in x.split(sizes, dim=1):
                out.append(run(mixer, piece, cache))
            torch.testing.assert_close(torch.cat(out, 1), whole, atol=1e-4, rtol=1e-4)
            assert cache.layers[1].get_seq_length() == 70
            assert cache.layers[1].rows.keys() == rows.keys()
            for name, value in cache.layers[1].rows.items():
                torch.testing.assert_close(value, rows[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [23, 6, 1])
@pytest.mark.parametrize("call", CALLS)
def test_a_padded_row_is_the_row_alone_and_so_is_its_state(call, size):
    """Pads left, right, in between, everywhere; in pieces a whole piece of a row may be pads."""
    mixer, length = lone(call), 23
    mask = torch.ones(7, length, dtype=torch.long)
    mask[1, :5] = 0
    mask[2, 18:] = 0
    mask[3, 9:16] = 0
    mask[4, :13] = mask[4, 20:] = 0
    mask[5, 2:] = 0
    mask[6] = 0
    x = stream(7, length)
    x[mask == 0] = 1e3
    cache, out = DynamicCache(), []
    with torch.no_grad():
        for start in range(0, length, size):
            end = min(start + size, length)
            out.append(run(mixer, x[:, start:end], cache, mask[:, :end]))
        out = torch.cat(out, 1)
        rows = cache.layers[1].rows
        assert cache.layers[1].seen.tolist() == mask.sum(1).tolist()
        assert cache.layers[1].get_seq_length() == length
        for row in range(6):
            real = mask[row] == 1
            alone, state = rows_after(mixer, x[row : row + 1, real])
            torch.testing.assert_close(out[row, real], alone[0], atol=1e-4, rtol=1e-4)
            for name, value in state.items():
                torch.testing.assert_close(rows[name][row], value[0], atol=1e-4, rtol=1e-4)
    assert all(not value[6].any() for value in rows.values())
    assert out.isfinite().all()


@pytest.mark.parametrize("call", NAMES)
def test_gradients_flow_through_a_padded_batch_as_through_its_rows(call):
    mixer, mask = lone(call).requires_grad_(True), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    weight = stream(2, 9, seed=3) * mask[..., None]
    parameters = list(mixer.parameters())
    together = torch.autograd.grad((run(mixer, stream(2, 9), mask=mask) * weight).sum(), parameters)
    a = (run(mixer, stream(2, 9)[:1, 4:]) * weight[:1, 4:]).sum()
    b = (run(mixer, stream(2, 9)[1:]) * weight[1:]).sum()
    for got, wanted in zip(together, torch.autograd.grad(a + b, parameters), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("call", CALLS)
def test_what_the_cache_holds_is_not_changed_by_the_next_call(call):
    mixer, cache = lone(call), DynamicCache()
    run(mixer, stream(2, 5), cache)
    held = dict(cache.layers[1].rows)
    before = {name: value.clone() for name, value in held.items()}
    for length in (1, 3):
        run(mixer, stream(2, length), cache)
    assert all(torch.equal(held[name], before[name]) for name in before)


@pytest.mark.parametrize("call", CALLS)
def test_the_state_does_not_grow_and_holds_no_view_of_the_prompt(call):
    mixer = lone(call)
    (_, short), (_, long) = (rows_after(mixer, stream(2, n)) for n in (7, 90))
    assert {k: v.shape for k, v in short.items()} == {k: v.shape for k, v in long.items()}
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in long.values())
    assert ("recurrent" in long) == (name_of(call) != "short_conv")


@pytest.mark.parametrize(
    "call, size",
    [
        ("mamba2", 175_104),
        ("gated_deltanet", 175_104),
        ("kda", 175_104),
        ("mamba", 92_160),
        ("short_conv", 6_912),
    ],
)
def test_state_bytes_of_smollm2_are_what_the_file_says(call, size):
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    mixer = part(swap(tiny("llama", num_hidden_layers=2, **sizes), f"layer1:{call}"))
    x = torch.randn(1, 5, 576, generator=gen(0))
    rows = rows_after(mixer, x)[1]
    assert sum(value.nbytes for value in rows.values()) == size
    assert f"{size:,} bytes" in mechanisms().card(call).text


@pytest.mark.parametrize("call", NAMES)
def test_beside_the_attention_it_keeps_its_own_state(call):
    model, ids = tiny("llama"), tokens(2, 21)
    silent = swap(model, f"layer1:parallel({call})").model
    assert torch.equal(silent(ids).logits, model(ids).logits)
    student = swap(model, f"layer0:parallel({call}, alpha=0.5)").model
    whole = student(ids).logits
    for size in (1, 6):
        torch.testing.assert_close(in_chunks(student, ids, size), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "gpt_neox"])
@pytest.mark.parametrize("call", NAMES)
def test_with_every_layer_swapped_generate_goes_on_as_it_should(family, call):
    """No attention is left that could report a length; beams, left padding, chunks."""
    model = swap(tiny(family), f"all:{call}").model.requires_grad_(False)
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    ids[0, :3] = mask[0, :3] = 0
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    settings |= {"output_scores": True, "return_dict_in_generate": True}
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **settings)
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.scores, plain.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    whole = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    for size in (1, 4):
        pieces = in_chunks(model, ids, size, mask)
        torch.testing.assert_close(pieces[mask == 1], whole[mask == 1], atol=1e-3, rtol=0)


def test_states_answer_for_an_empty_cache_as_transformers_does():
    states = States({})
    assert states.get_conv_state(0) is states.get_recurrent_state(0) is None
    x = torch.ones(1, 2, 2)
    assert states.update_conv_state(x, 0, conv_kernel_size=4).shape == (1, 2, 6)
    assert states.get_conv_state(0)[0, 0].tolist() == [0, 0, 1, 1]
