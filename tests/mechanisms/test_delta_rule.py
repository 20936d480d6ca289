"""The generalised delta rule in chunks, against itself token by token: outputs, states, gradients."""

from __future__ import annotations

import pytest
import torch
from reference_rwkv import LENGTHS, close, recurrence

from mismatch.mechanisms.parts.delta_rule import chunked_delta_rule
from mismatch.mechanisms.rwkv import FASTEST


def operands(length, decay, dtype=torch.float64, d=16, batch=2, heads=3):
    """r, log w, k, v, a, b, S of RWKV-7's kind; `decay`: share of the fastest, or None = mixed."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(batch, heads, *shape, generator=generator, dtype=torch.float64)

    r, k, v, kappa = (draw(length, d) for _ in range(4))
    kappa = kappa / kappa.norm(dim=-1, keepdim=True)
    share = torch.sigmoid(4 * draw(length, d)) if decay is None else torch.full_like(r, decay)
    # With a slow decay the boldest learning rate too: the state is then turned, hardly damped.
    rate = torch.ones_like(r) if decay == 0 else torch.sigmoid(draw(length, d))
    all_of_it = (3 * r, -FASTEST * share, 3 * k, v, -kappa, kappa * rate, draw(d, d))
    return [x.to(dtype).requires_grad_(True) for x in all_of_it]


def results(rule, inputs, **more):
    """y, S, and the gradients of all operands under a fixed random loss."""
    y, state = rule(*inputs, **more)
    generator = torch.Generator().manual_seed(1)
    weigh = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y, state)]
    loss = sum((x * w.to(x.dtype)).sum() for x, w in zip((y, state), weigh, strict=True))
    return [y, state, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("decay", [1.0, 0.0, None], ids=["fastest", "none", "mixed"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_chunks_are_the_recurrence_in_outputs_and_gradients(length, decay, dtype, tolerance):
    wanted = results(recurrence, operands(length, decay))
    got = results(chunked_delta_rule, operands(length, decay, dtype))
    for a, b in zip(got, wanted, strict=True):
        close(a, b, tolerance)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_the_size_of_a_chunk_does_not_matter(chunk):
    wanted = results(recurrence, operands(70, None))
    for a, b in zip(
        results(chunked_delta_rule, operands(70, None), chunk=chunk), wanted, strict=True
    ):
        close(a, b, 1e-13)


def test_two_calls_are_one():
    *tokenwise, state = operands(50, None)
    y, end = chunked_delta_rule(*tokenwise, state)
    first, middle = chunked_delta_rule(*(x[:, :, :17] for x in tokenwise), state)
    second, last = chunked_delta_rule(*(x[:, :, 17:] for x in tokenwise), middle)
    close(torch.cat([first, second], 2), y, 1e-13)
    close(last, end, 1e-13)
