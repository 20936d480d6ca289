"""Every mechanism of the table comes back from a checkpoint to the bit, in every dtype, and goes on speaking.

A trained student is stood in for by one whose every tensor was moved: what is not in the file, or is not read, shows.
"""

from __future__ import annotations

import pytest
import torch
from test_mechanism_contract import CALLS, IN_HEADS, LENGTH, fits, text
from tiny_models import FAMILIES, in_chunks, positions, swap, tiny, tokens

from mismatch.surgery import saving
from mismatch.surgery.loading import MismatchForCausalLM

TWO = ("llama", "gpt2")
EVERYWHERE = ("infini", "dyt", "mean", "parallel", "lora", "nope")  # one of each way to be built
STACKED = "layer1:infini(segment=8); layer1:parallel(random, alpha=0.3); layer2.mlp:mean; layer0.block:parallel(zero)"


@pytest.fixture(autouse=True)
def extras(request):
    """As in the contract: qlora needs an optional package."""
    case = getattr(request.node, "callspec", None)
    if case is not None and case.params.get("name") in ("qlora", "quantized"):
        pytest.importorskip("bitsandbytes")


def cases():
    pairs = [(family, name) for family in TWO for name in (*CALLS, *IN_HEADS)]
    pairs += [(f, name) for f in FAMILIES if f not in TWO for name in EVERYWHERE]
    return [pytest.param(f, name, id=f"{f}-{name}") for f, name in pairs if fits(f, name)]


def moved(model):
    """The model with noise on every floating-point tensor of its state."""
    draws = torch.Generator().manual_seed(5)
    done = set()
    with torch.no_grad():
        for value in model.state_dict(keep_vars=True).values():
            if value.is_floating_point() and id(value) not in done:
                noise = torch.randn(value.shape, generator=draws).to(value.dtype)
                value.add_(noise * 0.05)
                done.add(id(value))
    return model


def attention(family):
    return {"attn_implementation": "eager"} if family == "gemma2" else {}


def reloaded(model, path, family, **options):
    saving.save(model, path)
    return MismatchForCausalLM.from_pretrained(path, **attention(family), **options)


def assert_same(a, b):
    """The same tensors under the same names, buffers outside the state dict included, and the same logits."""
    for kind in ("parameters", "buffers"):
        mine, theirs = (dict(getattr(m, f"named_{kind}")(remove_duplicate=False)) for m in (a, b))
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert value.dtype == theirs[name].dtype, name
            assert torch.equal(value, theirs[name]), name
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        assert torch.equal(a(ids).logits, b(ids).logits)


@pytest.mark.parametrize("family, name", cases())
def test_it_comes_back_to_the_bit(family, name, tmp_path):
    model = moved(swap(tiny(family), text(name, 1), seed=3).model)
    assert_same(model, reloaded(model, tmp_path / "saved", family))


@pytest.mark.parametrize("name", [*CALLS, *IN_HEADS])
def test_in_bfloat16_too(name, tmp_path):
    plain = tiny("llama")
    for (
        weight
    ) in plain.parameters():  # as from_pretrained does it: `.to` would round the rotary frequencies
        weight.data = weight.data.bfloat16()
    model = moved(swap(plain, text(name, 1)).model)
    again = reloaded(model, tmp_path / "saved", "llama")
    assert again.dtype == torch.bfloat16
    assert_same(model, again)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_stacked_nested_and_with_tied_embeddings(family, tmp_path):
    model = moved(swap(tiny(family, tie_word_embeddings=True), STACKED).model)
    again = reloaded(model, tmp_path / "saved", family)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    block = again.model.layers[0]
    assert block.inner.original.mlp.down_proj.weight is block.original.mlp.down_proj.weight
    assert_same(model, again)


@pytest.mark.parametrize("name", [*CALLS, *IN_HEADS])
def test_it_goes_on_speaking(name, tmp_path):
    model = reloaded(moved(swap(tiny("llama"), text(name, 1)).model), tmp_path / "saved", "llama")
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    ids[0, :3] = mask[0, :3] = 0
    settings = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **settings)
    assert torch.equal(
        cached, model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    )
    whole = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    pieces = in_chunks(model, ids, 4, mask)
    torch.testing.assert_close(pieces[mask == 1], whole[mask == 1], atol=1e-4, rtol=0)
