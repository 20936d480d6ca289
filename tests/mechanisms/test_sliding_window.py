"""The window, the sinks, and the masks of the host that must go on counting."""

from __future__ import annotations

import subprocess
import sys

import peak_memory
import pytest
import torch
from tiny_models import FAMILIES, in_chunks, positions, swap, tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from mismatch.errors import SurgeryError
from mismatch.mechanisms import sliding_window

OWN_WINDOW = ("mistral_window", "gemma2", "gemma3", "qwen2", "phi3", "olmo3", "gemma4")


def window_mask(length, window, sinks, every=0):
    """bool `1 1 length length`, written token by token."""
    kept = {j for j in range(length) if j < sinks or (every and j % every == 0)}
    rows = [
        [j <= i and (i - j < window or j in kept) for j in range(length)] for i in range(length)
    ]
    return torch.tensor(rows)[None, None]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "window, sinks, every",
    [
        (1, 0, 0),
        (1, 1, 0),
        (5, 0, 0),
        (5, 2, 0),
        (5, 7, 0),
        (19, 1, 0),
        (1, 0, 1),
        (3, 0, 4),
        (5, 2, 7),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_it_is_the_model_under_a_mask_written_by_hand(family, window, sinks, every, attn):
    model, ids = tiny(family, attn), tokens(2, 20)
    mask = window_mask(20, window, sinks, every).expand(2, -1, -1, -1)
    if attn == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    wanted = model(ids, attention_mask=mask).logits
    options = f"window={window}, sinks={sinks}, global_every={every}"
    student = swap(model, f"all:sliding_window({options})").model
    torch.testing.assert_close(student(ids).logits, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(in_chunks(student, ids, 6), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(in_chunks(student, ids, 1), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [20, 6, 1])
@pytest.mark.parametrize("options", ["sinks=2", "global_every=5", "sinks=2, global_every=3"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_sinks_and_global_tokens_are_counted_in_real_tokens(family, attn, options, size):
    student = swap(tiny(family, attn), f"layer1:sliding_window(window=4, {options})").model
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    padded = in_chunks(student, ids.masked_fill(mask == 0, 0), size, mask)
    alone = student(ids[:1, 7:]).logits
    torch.testing.assert_close(padded[:1, 7:], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", OWN_WINDOW)
def test_over_a_module_with_a_window_the_narrower_one_counts(family):
    model, ids = tiny(family), tokens(2, 20)
    wide = swap(model, "all:sliding_window(window=15)").model
    layers = range(3)
    own = [model.config.get_text_config().to_dict().get("layer_types") or ["sliding_attention"] * 3]
    if all(own[0][i] == "sliding_attention" for i in layers):
        torch.testing.assert_close(wide(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    narrow = swap(model, "all:sliding_window(window=3)").model
    assert (narrow(ids).logits - model(ids).logits).abs().max() > 1e-2
    torch.testing.assert_close(in_chunks(narrow, ids, 4), narrow(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [5, 2048])
@pytest.mark.parametrize("sinks, every", [(1, 0), (2, 4)])
@pytest.mark.parametrize("family", OWN_WINDOW)
def test_over_a_module_with_a_window_sinks_and_global_tokens_stay(
    family, sinks, every, chunk, monkeypatch
):
    """In one call, in pieces, from a static cache, and with pads."""
    monkeypatch.setattr(sliding_window, "CHUNK", chunk)
    model, ids = tiny(family).requires_grad_(False), tokens(2, 20)
    mask = window_mask(20, 3, sinks, every).expand(2, -1, -1, -1)
    if family == "gemma2":  # eager
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    wanted = model(ids, attention_mask=mask).logits
    text = f"all:sliding_window(window=3, sinks={sinks}, global_every={every})"
    student = swap(model, text).model
    torch.testing.assert_close(student(ids).logits, wanted, atol=1e-4, rtol=0)
    for size in (1, 7):
        torch.testing.assert_close(in_chunks(student, ids, size), wanted, atol=1e-4, rtol=0)
    cache = StaticCache(config=model.config, max_cache_len=24)
    pieces = [student(piece, past_key_values=cache).logits for piece in ids.split((8, 1, 11), 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), wanted, atol=1e-4, rtol=0)
    pads = torch.ones(2, 20, dtype=torch.long)
    pads[0, :7] = 0
    padded = in_chunks(student, ids.masked_fill(pads == 0, 0), 6, pads)
    torch.testing.assert_close(padded[:1, 7:], student(ids[:1, 7:]).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_over_a_module_with_a_window_or_none_texts_of_a_row_have_sinks_of_their_own(family):
    student = swap(tiny(family), "all:sliding_window(window=3, sinks=2)").model
    ids, places = tokens(1, 20), torch.cat([torch.arange(8), torch.arange(12)])[None]
    got = student(ids, position_ids=places, use_cache=False).logits
    alone = [student(text).logits for text in ids.split((8, 12), 1)]
    torch.testing.assert_close(got, torch.cat(alone, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", ["window=4", "window=4, sinks=2, global_every=5"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3"])
def test_in_chunks_of_queries_it_is_the_whole_and_so_are_its_gradients(
    family, attn, options, monkeypatch
):
    model, ids = tiny(family, attn).requires_grad_(True), tokens(2, 21)
    below = "" if family == "gpt2" else "layer1:rope(type=linear, factor=2); "
    student = swap(model, f"{below}layer1:sliding_window({options})").model
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :4] = 0
    found = []
    for chunk in (2048, 5):
        monkeypatch.setattr(sliding_window, "CHUNK", chunk)
        student.zero_grad()
        out = student(ids, attention_mask=mask, position_ids=positions(mask)).logits[mask == 1]
        out.square().mean().backward()
        found.append((out, [p.grad for p in student.parameters() if p.grad is not None]))
        found[-1] += (student(ids).logits, in_chunks(student, ids, 11))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_every_token_global_is_the_model_itself():
    model, ids = tiny("llama"), tokens(2, 20)
    student = swap(model, "all:sliding_window(window=1, global_every=1)").model
    torch.testing.assert_close(student(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_as_long_as_the_text_changes_no_bit(family):
    more = "" if family in OWN_WINDOW else ", sinks=2, global_every=3"
    model, ids = tiny(family), tokens(2, 20)
    student = swap(model, f"all:sliding_window(window=20{more})").model
    assert torch.equal(student(ids).logits, model(ids).logits)


def test_over_a_mechanism_that_reads_no_mask_it_is_refused():
    with pytest.raises(SurgeryError, match="`Infini` decides by itself what it attends to"):
        swap(tiny("llama"), "layer1:infini; layer1:sliding_window(window=3)")


def test_a_mask_of_another_kind_is_refused():
    student = swap(tiny("llama"), "layer1:sliding_window(window=3)")
    attn = student.layout.blocks[1].self_attn
    with pytest.raises(SurgeryError, match="passes its attention a 2-D mask"):
        attn(hidden_states=torch.zeros(1, 9, 24), attention_mask=torch.ones(1, 9))


def test_padding_and_window_together():
    """Against a mask written by hand, in the middle of a padded batch."""
    model, ids = tiny("llama"), tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    by_hand = window_mask(12, 4, 0).expand(2, 1, -1, -1).clone()
    by_hand[0, 0, :, :3] = False
    by_hand[0, 0, range(3), range(3)] = True  # a pad must read something
    ids_at = positions(mask)
    wanted = model(ids, attention_mask=by_hand, position_ids=ids_at).logits
    got = swap(model, "all:sliding_window(window=4)").model(
        ids, attention_mask=mask, position_ids=ids_at
    )
    torch.testing.assert_close(got.logits[mask == 1], wanted[mask == 1], atol=1e-5, rtol=0)


def test_who_watches_the_attention_sees_all_tokens_in_one_call(monkeypatch):
    monkeypatch.setattr(sliding_window, "CHUNK", 5)
    student, ids = swap(tiny("llama"), "layer1:sliding_window(window=4)"), tokens(2, 20)
    wanted, seen = student.model(ids).logits, []
    attention = student.layout.blocks[1].self_attn.original
    attention.register_forward_pre_hook(
        lambda _, args, call: seen.append(call["attention_mask"].shape), with_kwargs=True
    )
    torch.testing.assert_close(student.model(ids).logits, wanted, atol=1e-5, rtol=0)
    assert seen == [(1, 1, 20, 20)]


class Largest(TorchDispatchMode):
    """The most numbers that any result holds."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("call", ["sliding_window(window=200, sinks=4)", "ring"])
def test_nothing_of_the_size_of_queries_times_keys_is_made(call):
    length = 5000
    model = tiny("llama", num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    student, largest = swap(model, f"layer0:{call}").model, Largest()
    with torch.no_grad(), largest:
        student.model(tokens(1, length), use_cache=False)
    assert largest.numbers < length * length / 5


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_sixteen_thousand_tokens_need_about_the_memory_of_full_attention(way):
    peaks = {
        call: int(subprocess.check_output([sys.executable, peak_memory.__file__, call, way]))
        for call in ("full", "sliding_window(window=256, sinks=4)", "ring")
    }
    # What a window keeps for the backward pass are the masks of its chunks, and the keys they share twice.
    room = 1.05 if way == "forward" else 1.25
    assert max(peaks.values()) < room * peaks["full"], peaks
