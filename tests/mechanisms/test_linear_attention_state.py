"""The state of linear attention: the same output however a text is fed, batched, padded or beamed."""

from __future__ import annotations

import pytest
import torch
from lone_infini import llama, run, state_after, stream
from lone_linear_attention import VARIANTS, module
from tiny_models import in_chunks, positions, swap, tokens
from transformers import DynamicCache

from mismatch.errors import SurgeryError
from mismatch.mechanisms.parts import packing

TEXTS = [
    "linear_attention",
    "linear_attention(feature_map=relu, sinks=3, decay=learned)",
    "linear_attention(window=4)",
    "linear_attention(window=4, sinks=3, decay=learned)",
]


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 8)


@pytest.mark.parametrize("size", [1, 3, 6, 7, 8, 20])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_fed_in_pieces_it_is_the_whole(settings, size):
    linear, x = module(**settings), stream(2, 31)
    cache = DynamicCache()
    pieces = [run(linear, x[:, s : s + size], s, cache) for s in range(0, 31, size)]
    torch.testing.assert_close(torch.cat(pieces, 1), run(linear, x), atol=1e-5, rtol=0)
    whole = state_after(linear, x).rows
    assert cache.layers[1].rows.keys() == whole.keys()
    for name, value in cache.layers[1].rows.items():
        torch.testing.assert_close(value, whole[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", ["layer0", "layer2", "all"])
@pytest.mark.parametrize("text", TEXTS)
def test_generate_equals_the_full_forward(layer, text):
    student = swap(llama(), f"{layer}:{text}").model
    out = student.generate(
        tokens(2, 11), max_new_tokens=14, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    full = student(out.sequences).logits[:, 10:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), full, atol=1e-3, rtol=0)


@pytest.mark.parametrize("text", TEXTS)
def test_all_layers_generate_with_beams_and_left_padding(text):
    student = swap(llama(), f"all:{text}").model
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    ids[0, :6] = mask[0, :6] = 0
    settings = {"max_new_tokens": 9, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    settings |= {"output_scores": True, "return_dict_in_generate": True}
    cached = student.generate(ids, attention_mask=mask, use_cache=True, **settings)
    plain = student.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.scores, plain.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [30, 1, 7])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", TEXTS)
def test_padding_is_neither_counted_nor_written_nor_read(text, side, size):
    """Rows with different numbers of tokens in their windows; sums and sinks as of the row alone."""
    student = swap(llama(), f"layer1:{text}").model
    length, pads = 30, (0, 3, 8, 28)
    real, mask = tokens(4, length), torch.zeros(4, length, dtype=torch.long)
    batch = torch.full_like(real, 5)
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
        for name, b in alone.layers[1].rows.items():
            a = cache.layers[1].rows[name][row]
            columns = min(a.shape[1], b.shape[2])  # a short row alone holds fewer
            a, b = (a, b[0]) if name == "memory" else (a[:, -columns:], b[0, :, -columns:])
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("text", TEXTS)
def test_what_stands_in_a_pad_changes_nothing(text):
    student = swap(llama(), f"layer1:{text}").model
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    other = ids.clone()
    other[0, :5] = 7
    a, b = (
        student(x, attention_mask=mask, position_ids=positions(mask)).logits for x in (ids, other)
    )
    assert torch.equal(a[mask == 1], b[mask == 1])


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_a_pad_gets_nothing_and_gives_no_gradient(settings):
    """Gradients of the padded row are those of the row alone, beside one that is all pads."""
    linear = module(dtype=torch.float64, **settings)
    x = stream(2, 20, dtype=torch.float64).requires_grad_(True)
    alone = x.detach()[:1, 7:].clone().requires_grad_(True)
    run(linear, alone, offset=7).pow(2).sum().backward()
    out = run(linear, x, mask=torch.tensor([[0] * 7 + [1] * 13, [0] * 20]))
    nothing = linear.project(torch.zeros(1, 4, 1, 8).double())[0]
    assert torch.equal(out[0, :7], nothing.expand(7, -1))
    assert torch.equal(out[1], nothing.expand(20, -1))
    out.pow(2).sum().backward()
    torch.testing.assert_close(x.grad[:1, 7:], alone.grad, atol=1e-9, rtol=1e-7)
    assert torch.equal(x.grad[0, :7], torch.zeros_like(x.grad[0, :7]))
    assert torch.equal(x.grad[1], torch.zeros_like(x.grad[1]))


def test_a_short_row_that_is_selected_from_a_batch_goes_on_by_itself():
    """What the window holds is as wide as the longest row of the batch that was."""
    linear, x = module(window=9, sinks=2), stream(3, 20)
    cache = DynamicCache()
    mask = torch.tensor([[1] * 12, [0] * 8 + [1] * 4, [0] * 12])
    run(linear, x[:, :12], cache=cache, mask=mask)
    cache.layers[1].reorder_cache(torch.tensor([1, 1]))
    assert cache.layers[1].rows["near_k"].shape[2] == 9
    got = run(linear, x[1:2, 12:].repeat(2, 1, 1), offset=12, cache=cache)
    wanted = run(linear, x[1:2, 8:], offset=8)[:, 4:]
    torch.testing.assert_close(got, wanted.repeat(2, 1, 1), atol=1e-5, rtol=0)


def test_beside_the_original_and_without_positions_it_is_fed_in_pieces_too():
    text = "all:parallel(linear_attention(window=4, sinks=1), alpha=0.5); all.rope:nope"
    student, ids = swap(llama(), text).model, tokens(2, 20)
    torch.testing.assert_close(in_chunks(student, ids, 3), student(ids).logits, atol=1e-4, rtol=0)


def test_the_state_does_not_grow_and_holds_no_view_of_a_long_prompt():
    linear = module(window=6, sinks=2, decay="learned")
    short, long = (state_after(linear, stream(1, n)).rows for n in (8, 90))
    shapes = {name: value.shape for name, value in long.items()}
    assert {name: value.shape for name, value in short.items()} == shapes
    assert shapes["memory"] == (1, 2, 16, 9)
    assert shapes["near_k"] == shapes["near_v"] == (1, 2, 6, 8)
    assert shapes["sink_k"] == shapes["sink_v"] == (1, 2, 2, 8)
    for value in long.values():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_the_same_input_twice_gives_the_same_and_no_state_is_saved():
    linear, x = module(window=3), stream(2, 30)
    names = set(linear.state_dict())
    assert torch.equal(run(linear, x), run(linear, x))
    assert set(linear.state_dict()) == names
    assert not [name for name in names if "memory" in name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_sum_is_at_least_float32(dtype):
    linear, x = module(window=3, dtype=dtype), stream(1, 20, dtype=dtype)
    rows = state_after(linear, x).rows
    assert rows["memory"].dtype == torch.promote_types(dtype, torch.float32)
    assert rows["near_k"].dtype == dtype
    assert run(linear, x).dtype == dtype


def test_autocast_leaves_the_sum_alone(monkeypatch):
    linear, x = module(window=3), stream(1, 20)
    parts = linear.qkv(x)
    monkeypatch.setattr(linear, "qkv", lambda _: parts)
    wanted = state_after(linear, x).rows["memory"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = state_after(linear, x).rows["memory"]
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)


def test_a_padding_mask_of_another_batch_is_refused():
    linear = module()
    mask = torch.tensor([[0, 1, 1]] * 3)
    with pytest.raises(SurgeryError, match=r"padding mask \(3, 3\) for an input \(2, 3\)"):
        run(linear, stream(2, 3), mask=mask)
