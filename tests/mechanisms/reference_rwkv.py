"""RWKV-7 time mixing as the definition reads: one row, one token, one head at a time, float64.

It shares nothing with the fast path but the names of the weights. S is here as the paper has it,
values by keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mismatch.mechanisms.parts.delta_rule import CHUNK

LENGTHS = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5)


def recurrence(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`chunked_delta_rule` token by token: the same arguments and results."""
    out = []
    for t in range(r.shape[2]):
        taken = torch.einsum("bhk,bhkv->bhv", a[:, :, t], state)
        state = (
            log_w[:, :, t, :, None].exp() * state
            + torch.einsum("bhk,bhv->bhkv", b[:, :, t], taken)
            + torch.einsum("bhk,bhv->bhkv", k[:, :, t], v[:, :, t])
        )
        out.append(torch.einsum("bhk,bhkv->bhv", r[:, :, t], state))
    return torch.stack(out, dim=2), state


def time_mixing(x: Tensor, p: dict[str, Tensor], n_heads: int) -> tuple[Tensor, Tensor]:
    """One row of real tokens.

    Args:
        x: `pos d_model`.
        p: weights by name; `W_r W_k W_v W_o` are `out in` with all heads repeated, biases `b_r` ...
        n_heads: H.

    Returns:
        y `pos d_model`, and S after the last token, `H D D` (values by keys).
    """
    d = len(p["w0"]) // n_heads
    before = torch.zeros_like(x[0])
    states = [torch.zeros(d, d, dtype=x.dtype) for _ in range(n_heads)]
    rows = []
    for token in x:
        m_r, m_w, m_k, m_v, m_a, m_g = (token + mu * (before - token) for mu in p["mu"])
        before = token
        r = p["W_r"] @ m_r + p["b_r"]
        k = p["W_k"] @ m_k + p["b_k"]
        v = p["W_v"] @ m_v + p["b_v"]
        speed = torch.sigmoid(p["w0"] + p["w2"].T @ torch.tanh(p["w1"].T @ m_w))
        w = torch.exp(-math.exp(-0.5) * speed)
        a = torch.sigmoid(p["a0"] + p["a2"].T @ (p["a1"].T @ m_a))
        g = p["g2"].T @ torch.sigmoid(p["g1"].T @ m_g)
        heads = []
        for h in range(n_heads):
            at = slice(h * d, (h + 1) * d)
            kappa = k[at] * p["k_k"][h]
            kappa = kappa / kappa.norm()
            written = k[at] * (1 + (a[at] - 1) * p["k_a"][h])
            forget = torch.diag(w[at]) - torch.outer(kappa, a[at] * kappa)
            states[h] = states[h] @ forget + torch.outer(v[at], written)
            y = states[h] @ r[at]
            y = (y - y.mean()) / torch.sqrt(y.var(correction=0) + 1e-5 * d)
            y = y * p["ln_x"][h] + p["ln_x_bias"][h]
            heads.append(y + (r[at] * p["r_k"][h] * written).sum() * v[at])
        rows.append(p["W_o"] @ (g * torch.cat(heads)) + p["b_o"])
    return torch.stack(rows), torch.stack(states)


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Against the largest number of what is wanted."""
    assert got.shape == wanted.shape
    assert (got.double() - wanted.double()).abs().max() <= tolerance * wanted.abs().max()
