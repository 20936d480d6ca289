"""The window, the sinks, and the masks of the host that must go on counting."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, in_chunks, positions, swap, tiny, tokens

from mismatch.errors import SurgeryError

OWN_WINDOW = ("mistral_window", "gemma2", "gemma3", "qwen2", "phi3", "olmo3")


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


@pytest.mark.parametrize(
    "option, words", [("sinks=1", "sinks"), ("global_every=4", "global tokens")]
)
@pytest.mark.parametrize("family", OWN_WINDOW)
def test_sinks_and_global_tokens_over_a_cache_that_drops_them_are_refused(family, option, words):
    with pytest.raises(
        SurgeryError, match=rf"own window of \d tokens, and .* {words} cannot be kept"
    ):
        swap(tiny(family), f"all:sliding_window(window=3, {option})")


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
