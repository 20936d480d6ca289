"""The state of Infini-attention: the same output however a text is fed, batched, padded or beamed.

Published implementations lose it between calls, keep it in half precision, or write padding to it.
"""

from __future__ import annotations

import pytest
import torch
from lone_infini import VARIANTS, N, llama, module, run, state_after, stream
from tiny_models import in_chunks, positions, swap, tokens
from transformers import DynamicCache, StaticCache

from mismatch.errors import SurgeryError
from mismatch.mechanisms.parts.feature_maps import elu_plus_one

# state ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, N - 1, N, N + 1, 3 * N])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_fed_in_pieces_it_is_the_whole(settings, size):
    infini, x = module(**settings), stream(2, 50)
    cache = DynamicCache()
    pieces = [run(infini, x[:, s : s + size], s, cache) for s in range(0, 50, size)]
    torch.testing.assert_close(torch.cat(pieces, 1), run(infini, x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prompt", [5, N, 2 * N, 2 * N + 3])
@pytest.mark.parametrize("layer", ["layer0", "layer1", "layer2", "all"])
def test_generate_equals_the_full_forward(layer, prompt):
    """Three boundaries and more, prompts longer than a segment and exactly k segments, layer 0
    too."""
    student = swap(llama(), f"{layer}:infini(segment={N}, sinks=2)").model
    out = student.generate(
        tokens(2, prompt), max_new_tokens=3 * N + 2, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    full = student(out.sequences).logits[:, prompt - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), full, atol=1e-3, rtol=0)


def test_layer_0_reports_its_true_length():
    student = swap(llama(), f"layer0:infini(segment={N})").model
    cache, ids = DynamicCache(config=student.config), tokens(1, 20)
    student(ids, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 20
    assert cache.get_mask_sizes(3, 0) == (23, 0)
    step = student(ids[:, :1], past_key_values=cache, use_cache=True).logits
    whole = student(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(step, whole, atol=1e-4, rtol=0)


def test_the_same_input_twice_gives_the_same_and_no_state_is_saved():
    infini, x = module(), stream(2, 30)
    names = set(infini.state_dict())
    assert torch.equal(run(infini, x), run(infini, x))
    assert set(infini.state_dict()) == names
    assert not [n for n in names if "memory" in n or "norm" in n]


def test_rows_are_independent_and_beams_take_their_memory_along():
    infini, x = module(sinks=2), stream(3, 30)
    torch.testing.assert_close(run(infini, x)[1:2], run(infini, x[1:2]), atol=1e-6, rtol=0)
    state = state_after(infini, x)
    before = {name: value.clone() for name, value in state.rows.items()}
    state.reorder_cache(torch.tensor([2, 0, 0]))
    assert {"memory", "norm", "open_k", "open_k_rot", "open_v", "sink_k", "sink_v"} == set(before)
    assert all(torch.equal(state.rows[name], value[[2, 0, 0]]) for name, value in before.items())
    state.batch_repeat_interleave(2)
    assert state.rows["memory"].shape[0] == len(state.seen) == 6
    state.batch_select_indices(torch.tensor([1]))
    assert torch.equal(state.rows["memory"], before["memory"][[2]])
    state.reset()
    assert state.get_seq_length() == 0
    assert state.rows == {}


@pytest.mark.parametrize("size", [40, 1, 7, N])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_counted_nor_written_nor_read(side, size):
    """Rows at different places of their segments; memory and norm as of the row alone."""
    student = swap(llama(), f"layer1:infini(segment={N}, sinks=3, update=delta)").model
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
        for name in ("memory", "norm", "sink_k"):
            a, b = cache.layers[1].rows[name][row], alone.layers[1].rows[name][0]
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_what_stands_in_a_pad_changes_nothing():
    student = swap(llama(), f"layer1:infini(segment={N})").model
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    other = ids.clone()
    other[0, :5] = 7
    a = student(ids, attention_mask=mask, position_ids=positions(mask)).logits
    b = student(other, attention_mask=mask, position_ids=positions(mask)).logits
    assert torch.equal(a[mask == 1], b[mask == 1])


# size and precision ------------------------------------------------------------------


def test_the_state_does_not_grow():
    infini = module(sinks=2)
    short, long = (state_after(infini, stream(1, n)).rows for n in (3 * N - 1, 13 * N - 1))
    assert {k: v.shape for k, v in short.items()} == {k: v.shape for k, v in long.items()}
    assert short["memory"].numel() + short["norm"].numel() == 2 * (8 * 8 + 8)
    assert long["open_k"].shape[2] == N - 1


def test_the_cache_keeps_no_view_of_a_long_prompt():
    rows = state_after(module(), stream(2, 9 * N + 3)).rows
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in rows.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_memory_is_at_least_float32(dtype):
    rows = state_after(module(dtype=dtype), stream(1, 20, dtype=dtype)).rows
    wide = torch.promote_types(dtype, torch.float32)
    assert rows["memory"].dtype == rows["norm"].dtype == wide
    assert rows["open_k"].dtype == dtype


def test_float16_does_not_overflow_where_its_own_sum_would():
    infini = module(dtype=torch.float16)
    with torch.no_grad():
        infini.k_proj.bias.fill_(100.0)
    rows = state_after(infini, stream(1, 120 * N, dtype=torch.float16)).rows
    assert rows["norm"].max() > torch.finfo(torch.float16).max
    assert rows["memory"].isfinite().all()


def test_autocast_leaves_the_memory_alone():
    infini, x = module(), stream(1, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = state_after(infini, x).rows
    assert rows["memory"].dtype == torch.float32
    k, v = (rows[name] for name in ("open_k", "open_v"))
    assert k.dtype == v.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [-18.0, -40.0, -80.0])
def test_sigma_stays_above_zero_where_elu_plus_one_rounds_to_it(value):
    x = torch.tensor([value])
    assert torch.nn.functional.elu(x) + 1 == 0
    torch.testing.assert_close(elu_plus_one(x), x.exp())
    y = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(elu_plus_one(y), torch.nn.functional.elu(y) + 1)


# loud refusals -----------------------------------------------------------------------------------


def test_in_a_static_cache_it_is_the_whole():
    student = swap(llama(), f"layer1:infini(segment={N})").model
    cache, ids = StaticCache(config=student.config, max_cache_len=32), tokens(1, 13)
    pieces = [
        student(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 6), (6, 7), (7, 13))
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), student(ids).logits, atol=1e-4, rtol=0)


def test_a_cache_of_another_model_is_refused():
    student = swap(llama(), f"layer1:infini(segment={N})").model
    cache = DynamicCache(config=student.config)
    llama()(tokens(1, 4), past_key_values=cache, use_cache=True)
    with pytest.raises(SurgeryError, match=r"DynamicLayer, 4 tokens\) was written by another"):
        student(tokens(1, 4), past_key_values=cache, use_cache=True)


def test_a_written_segment_cannot_be_cropped_away():
    state = state_after(module(), stream(1, 20))
    assert not state.is_croppable
    for tokens_to_remove in (0, -1):
        with pytest.raises(SurgeryError, match="no token can be taken back out of a state"):
            state.crop(tokens_to_remove)


def test_a_padding_mask_of_another_batch_is_refused():
    infini = module()
    mask = torch.tensor([[0, 1, 1]] * 3)
    with pytest.raises(SurgeryError, match=r"padding mask \(3, 3\) for an input \(2, 3\)"):
        run(infini, stream(2, 3), mask=mask)
