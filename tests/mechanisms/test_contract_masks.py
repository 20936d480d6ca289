"""Padding, in every form in which a caller can tell a model of it: each real token has the output it has alone."""

from __future__ import annotations

import threading

import pytest
import torch
from callers import COUNTS, LENGTH, added, cases, decoder, padded, pairs
from tiny_models import positions, swap, tiny, tokens
from transformers import DynamicCache, StaticCache

from mismatch.errors import SurgeryError

FAMILIES = ("llama", "gpt2", "gpt_neox")


def called(model, ids, mask, places, **more):
    return model(ids, attention_mask=mask, position_ids=places, **more).logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family, name", cases(FAMILIES))
@torch.no_grad()
def test_a_4d_mask_of_padding_is_the_2d_one(student, family, name, side):
    model = student(family, name)
    ids, mask, places = padded(side)
    real = mask.bool()
    wanted = called(model, ids, mask, places)[real]
    allowed = pairs(mask)
    every = allowed | ~allowed.any(
        -1, keepdim=True
    )  # as transformers once left no query without a key
    for given in (
        allowed,
        every,
        added(allowed),
        added(allowed, float("-inf")).nan_to_num(neginf=-1e9),
    ):
        got = called(model, ids, given, places, use_cache=False)[real]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", COUNTS)
@torch.no_grad()
def test_pads_that_read_themselves_are_texts_of_their_own(student, name):
    model = student("llama", name)
    ids, mask, places = padded()
    eye = torch.eye(LENGTH, dtype=torch.bool)
    got = called(model, ids, pairs(mask) | eye, places, use_cache=False)[mask == 1]
    torch.testing.assert_close(got, called(model, ids, mask, places)[mask == 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family, name", cases(FAMILIES, others=()))
@torch.no_grad()
def test_a_mask_without_its_name(student, family, name):
    """To the decoder; in gpt2 the cache comes before the mask."""
    inner = decoder(student(family, name))
    ids, mask, places = padded()
    given = (ids, None, mask) if family == "gpt2" else (ids, mask)
    wanted = inner(ids, attention_mask=mask, position_ids=places).last_hidden_state
    got = inner(*given, position_ids=places).last_hidden_state
    assert torch.equal(got[mask == 1], wanted[mask == 1])


@pytest.mark.parametrize("name", COUNTS)
@torch.no_grad()
def test_a_row_of_pads_alone_disturbs_no_other(student, name):
    model = student("llama", name)
    ids, mask, places = padded()
    mask[1] = 0
    wanted = model(ids[:1, 6:]).logits
    for given in (mask, pairs(mask)):
        got = called(model, ids, given, places)
        torch.testing.assert_close(got[:1, 6:], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", COUNTS)
@torch.no_grad()
def test_4d_masks_in_chunks_with_a_cache(student, name):
    """The first chunk of one row is padding alone."""
    model = student("llama", name)
    ids, mask, places = padded()
    wanted = called(model, ids, mask, places)
    cache, got = DynamicCache(config=model.config), []
    for start, end in ((0, 5), (5, 6), (6, 15), (15, 21)):
        given = pairs(mask)[:, :, start:end, :end]
        out = called(
            model,
            ids[:, start:end],
            given,
            places[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        got.append(out)
    got = torch.cat(got, dim=1)
    torch.testing.assert_close(got[mask == 1], wanted[mask == 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family, attn", [("llama", "sdpa"), ("gpt2", "eager")])
@pytest.mark.parametrize("name", COUNTS)
@torch.no_grad()
def test_a_static_cache_with_left_padding(student, family, name, attn):
    """generate() makes 4-D masks then, as wide as the cache."""
    model = student(family, name, attn)
    ids, mask, _ = padded()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    settings |= {"attention_mask": mask, "return_dict_in_generate": True}
    dynamic, static = (
        torch.stack(model.generate(ids, cache_implementation=kind, **settings).logits)
        for kind in ("dynamic", "static")
    )
    torch.testing.assert_close(static, dynamic, atol=1e-4, rtol=0)
    cache = StaticCache(config=model.config, max_cache_len=30)
    got = called(model, ids, mask, positions(mask), past_key_values=cache, use_cache=True)
    wanted = called(model, ids, mask, positions(mask), use_cache=False)
    torch.testing.assert_close(got[mask == 1], wanted[mask == 1], atol=1e-4, rtol=0)


BEHIND_A_WINDOW = {
    "gqa": "gqa(groups=1)",
    "mla": "mla(rank=9, rope_dim=4)",
    "ring": "ring(block=8)",
    "sliding_window": "sliding_window(window=4, sinks=2)",
    "topk": "topk(k=4)",
}


@pytest.mark.parametrize("call", BEHIND_A_WINDOW.values(), ids=BEHIND_A_WINDOW)
@pytest.mark.parametrize("family", ["phi3", "mistral_window"])
@torch.no_grad()
def test_pads_that_the_windows_of_all_layers_hide(family, call):
    """A static cache shows a step the last tokens alone; that pads stand before them its position tells."""
    model = swap(tiny(family), f"layer1:{call}").model
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    how["return_dict_in_generate"] = True
    out = model.generate(ids, attention_mask=mask, cache_implementation="static", **how)
    for row, first in ((0, 4), (1, 0)):
        alone = model.generate(ids[row : row + 1, first:], **how)
        for got, wanted in zip(out.logits, alone.logits, strict=True):
            torch.testing.assert_close(got[row], wanted[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_pads_that_a_window_shows_and_positions_do_not_tell_are_refused():
    model = swap(tiny("phi3"), "layer1:topk(k=4)").model
    cache, ids = DynamicCache(config=model.config), tokens(1, 9)
    model(ids, past_key_values=cache)
    shown = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    shown[..., 1] = False
    for more in ({}, {"position_ids": torch.tensor([[9]])}):
        with pytest.raises(SurgeryError, match="it has a window, and older tokens have to be"):
            model(ids[:, :1], attention_mask=shown, past_key_values=cache, **more)


@pytest.mark.parametrize("name", COUNTS)
@torch.no_grad()
def test_a_block_that_is_called_by_itself(student, name):
    """As tools do that run one block: nothing but its own call tells of the padding."""
    model = student("llama", name)
    ids, mask, places = padded()
    block, seen = decoder(model).layers[1], {}

    def look(_module, args, kwargs):
        seen.update(stream=args[0], **kwargs)

    handle = block.register_forward_pre_hook(look, with_kwargs=True)
    called(model, ids, mask, places, use_cache=False)
    handle.remove()
    wanted = block(seen.pop("stream").clone(), **seen)
    handle = block.register_forward_pre_hook(look, with_kwargs=True)
    called(model, ids, mask, places, use_cache=False)
    handle.remove()
    stream = seen.pop("stream")
    del seen["token_facts"]
    got = block(stream, **seen)
    torch.testing.assert_close(got[mask == 1], wanted[mask == 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["infini", "rwkv", "sliding_window"])
def test_threads_have_their_own_padding(student, name):
    model = student("llama", name)
    batches = [padded("left"), padded("right")] * 4
    with torch.no_grad():
        wanted = [called(model, *batch) for batch in batches]
    got: dict[int, torch.Tensor] = {}

    def work(i):
        with torch.no_grad():
            for _ in range(5):
                got[i] = called(model, *batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], wanted[i]) for i in range(len(batches)))


# loud refusals -----------------------------------------------------------------------------------


def square(value=True):
    return torch.full((1, 1, LENGTH, LENGTH), value)


REFUSED = {
    "both ways": (square(), "it is not causal"),
    "a hole": (
        square().tril() & (torch.arange(LENGTH) != 4) | torch.eye(LENGTH, dtype=torch.bool),
        "not causal",
    ),
    "a window": (square().tril().triu(-6), "it is not causal"),
    "a bias": (added(square().tril()) - 0.5, "neither 0 nor large"),
    "numbers": (square().tril().long(), "it holds int64"),
    "heads that differ": (
        torch.cat([square().tril()] * 3 + [square().tril().triu(-6)], 1),
        "heads differ",
    ),
    "one query": (square()[:, :, :1], "the call has 21 new tokens"),
    "3-D": (square()[0], "neither 2-D nor 4-D"),
    "too short": (torch.ones(2, 9), "there are 21 tokens, 0 of them cached"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_mask_that_is_no_padding_and_no_texts_is_refused(kind):
    from mismatch.mechanisms.parts.token_facts import TokenFacts

    mask, why = REFUSED[kind]
    facts = TokenFacts(LENGTH, mask)
    with pytest.raises(SurgeryError, match=why) as error:
        facts.real(torch.zeros(2, LENGTH, 4))
    assert "pass the tokenizer's attention_mask" in str(error.value.hint)
