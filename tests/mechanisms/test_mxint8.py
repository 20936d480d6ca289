"""MXINT8 against its definition: number by number, read back as often as one likes, with what is not finite."""

from __future__ import annotations

import pytest
import torch
from reference_kv_slots import held_in

from mismatch.mechanisms.parts import mxint8

WIDTHS = (1, 8, 32, 48, 64, 65)


def vectors(width, dtype=torch.float32):
    draw = torch.Generator().manual_seed(width)
    sizes = 10 ** torch.linspace(-6, 4, 21, dtype=torch.float64)
    return (
        torch.randn(21, 5, width, generator=draw, dtype=torch.float64) * sizes[:, None, None]
    ).to(dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_the_definition_and_takes_the_bytes_that_it_says(width):
    x = vectors(width)
    read = mxint8.rounded(x)
    assert torch.equal(read, held_in("mxint8", x))
    held = mxint8.packed(x)
    assert held.dtype == torch.int8 and held.shape == (21, 5, mxint8.bytes_of(width))
    assert torch.equal(mxint8.unpacked(held, width, torch.float32), read)
    largest = torch.cat([b.abs().amax(-1, True).expand_as(b) for b in x.split(32, -1)], -1)
    assert ((read - x).abs() <= largest / 127).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_was_read_is_read_again(dtype):
    x = vectors(64, dtype)
    if dtype == torch.float16:  # of which 2^-14 is the least with all its bits
        x = x[x.abs().amax((1, 2)) > 1]
    read = mxint8.rounded(x)
    assert read.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(read.to(dtype).to(read.dtype), read)
    assert torch.equal(mxint8.unpacked(mxint8.packed(read), 64, read.dtype), read)
    assert torch.equal(mxint8.rounded(read), read)


def test_zeros_the_least_and_the_largest_numbers():
    x = torch.zeros(4, 32)
    x[1, 0], x[2, 0], x[3, 0] = (
        torch.finfo(torch.float32).tiny,
        -torch.finfo(torch.float32).max,
        1.0,
    )
    read = mxint8.rounded(x)
    assert torch.equal(read[0], x[0]) and torch.equal(read[3], x[3])
    assert read[1, 0] <= 2.0**-126 and read.isfinite().all()
    torch.testing.assert_close(read[2], x[2], rtol=1 / 64, atol=0)
    assert torch.equal(mxint8.unpacked(mxint8.packed(x), 32, torch.float32), read)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_block_that_is_not_finite_is_nan_whole_and_no_other(broken):
    x = vectors(64)[0, 0].clone()
    x[3] = broken
    for read in (mxint8.rounded(x), mxint8.unpacked(mxint8.packed(x), 64, torch.float32)):
        assert read[:32].isnan().all() and read[32:].isfinite().all()


def test_the_gradient_goes_straight_through():
    x = vectors(48, torch.bfloat16).requires_grad_()
    weights = torch.randn(21, 5, 48)
    (mxint8.rounded(x) * weights).sum().backward()
    assert torch.equal(x.grad, weights.bfloat16())
