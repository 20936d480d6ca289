"""A mechanism in every layer at once: no attention of the host is left that could count tokens for it.

transformers takes positions and the sizes of masks from layer 0's cache entry, and some caches refuse to answer when no
layer is an ordinary attention.
"""

from __future__ import annotations

import functools

import pytest
import torch
from test_mechanism_contract import CALLS, LENGTH, fits
from tiny_models import N_LAYERS, in_chunks, positions, swap, tiny, tokens

FAMILIES = (
    "llama",
    "gemma3",
    "gpt2",
)  # plain; windows of its own in some layers; learned positions


@pytest.fixture(scope="module")
def student():
    """`student(family, name)`: every layer swapped; nothing here changes it."""
    return functools.cache(lambda family, name: swap(tiny(family), f"all:{CALLS[name]}").model)


@pytest.fixture(autouse=True)
def extras(request):
    """As in the contract: qlora needs an optional package."""
    if request.node.callspec.params["name"] in ("qlora", "quantized"):
        pytest.importorskip("bitsandbytes")


def cases():
    pairs = [
        (family, name)
        for family in FAMILIES
        for name in CALLS
        if all(fits(family, name, layer) for layer in range(N_LAYERS))
    ]
    return [pytest.param(*pair, id="-".join(pair)) for pair in pairs]


@pytest.mark.parametrize("family, name", cases())
def test_fed_in_chunks_or_token_by_token_it_is_the_whole(student, family, name):
    model, ids = student(family, name), tokens(2, LENGTH)
    whole = model(ids).logits
    for size in (1, 6):
        torch.testing.assert_close(in_chunks(model, ids, size), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family, name", cases())
def test_left_padded_and_fed_in_chunks_it_is_the_row_alone(student, family, name):
    model, ids = student(family, name), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    ids[1, :4] = mask[1, :4] = 0
    padded = in_chunks(model, ids, 8, mask)
    whole = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    torch.testing.assert_close(padded[mask == 1], whole[mask == 1], atol=1e-4, rtol=0)
    torch.testing.assert_close(padded[1, 4:], model(ids[1:, 4:]).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family, name", cases())
def test_generate_with_beams_and_left_padding_equals_generate_without_cache(student, family, name):
    model = student(family, name)
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    ids[0, :3] = mask[0, :3] = 0
    settings = {"max_new_tokens": 9, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    settings |= {"output_scores": True, "return_dict_in_generate": True}
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **settings)
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.scores, plain.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
