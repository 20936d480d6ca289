"""The four mixers token by token, in float64, as their papers write them: no chunk, no scan, no library.

Each takes the mixer's input `batch pos any` (what its input projection made) and its parameters by name, and gives the
heads before the output projection, `batch pos width`, and the last state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def convolved(x, weight, bias=None):
    """Each channel with its own last taps: y_t = sum_j w_j x_{t - K + 1 + j}, zeros before the text."""
    taps = weight.shape[-1]
    rows = []
    for t in range(x.shape[1]):
        y = torch.zeros_like(x[:, 0]) if bias is None else bias.expand_as(x[:, 0])
        for j in range(taps):
            if t - taps + 1 + j >= 0:
                y = y + weight[:, 0, j] * x[:, t - taps + 1 + j]
        rows.append(y)
    return torch.stack(rows, dim=1)


def rms(x, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def mamba2(columns, p, *, heads, head_dim, groups, state, norm="after", eps=1e-5):
    """arXiv 2405.21060: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t."""
    inner = heads * head_dim
    z, xbc, dt = columns.split([inner, inner + 2 * groups * state, heads], dim=-1)
    x, b, c = F.silu(convolved(xbc, p["conv1d.weight"], p["conv1d.bias"])).split(
        [inner, groups * state, groups * state], dim=-1
    )
    x = x.unflatten(-1, (heads, head_dim))
    b, c = (
        y.unflatten(-1, (groups, state)).repeat_interleave(heads // groups, dim=2) for y in (b, c)
    )
    dt = torch.log1p((dt + p["dt_bias"]).exp())
    a = -p["A_log"].exp()
    h, rows = columns.new_zeros(len(columns), heads, head_dim, state), []
    for t in range(columns.shape[1]):
        decay = (dt[:, t] * a).exp()[..., None, None]
        h = decay * h + dt[:, t, :, None, None] * x[:, t, ..., None] * b[:, t, :, None, :]
        rows.append((h * c[:, t, :, None, :]).sum(-1) + p["D"][:, None] * x[:, t])
    y, gate = torch.stack(rows, dim=1).flatten(-2), F.silu(z)
    y = y * gate if norm == "after" else y
    grouped = rms(y.unflatten(-1, (groups, inner // groups)), eps).flatten(-2) * p["norm.weight"]
    return grouped if norm == "after" else grouped * gate, h


def gated_deltanet(columns, p, *, heads, head_dim, eps=1e-6):
    """arXiv 2412.06464 eq. 10: S_t = S_{t-1} a_t (I - b_t k_t k_t^T) + b_t v_t k_t^T, o_t = S_t q_t."""
    qkvz, ba = columns.split([4 * heads * head_dim, 2 * heads], dim=-1)
    q, k, v, z = qkvz.unflatten(-1, (heads, 4, head_dim)).unbind(-2)
    b, a = ba.unflatten(-1, (heads, 2)).unbind(-1)
    qkv = torch.cat([y.flatten(-2) for y in (q, k, v)], dim=-1)
    q, k, v = (
        y.unflatten(-1, (heads, head_dim))
        for y in F.silu(convolved(qkv, p["conv1d.weight"])).chunk(3, dim=-1)
    )
    q, k = (y / (y.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = torch.sigmoid(b)
    alpha = (-p["A_log"].exp() * torch.log1p((a + p["dt_bias"]).exp())).exp()
    eye = torch.eye(head_dim, dtype=columns.dtype)
    s, rows = columns.new_zeros(len(columns), heads, head_dim, head_dim), []  # value x key
    for t in range(columns.shape[1]):
        kk = k[:, t, :, :, None] * k[:, t, :, None, :]
        step = beta[:, t, :, None, None]
        s = alpha[:, t, :, None, None] * (s @ (eye - step * kk))
        s = s + step * v[:, t, :, :, None] * k[:, t, :, None, :]
        rows.append((s @ q[:, t, :, :, None])[..., 0] / head_dim**0.5)
    o = torch.stack(rows, dim=1)
    # The library keeps keys in front: key x value.
    return (rms(o, eps) * p["norm.weight"] * F.silu(z)).flatten(-2), s.transpose(-1, -2)


def kda(q, k, v, b, f, z, p, *, heads, head_dim, eps=1e-5):
    """arXiv 2510.26692: S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T, o_t = S_t^T q_t; key x value."""
    weights = p["conv1d.weight"].chunk(3)
    q, k, v = (
        F.silu(convolved(y.flatten(2), w)).unflatten(-1, (heads, head_dim))
        for y, w in zip((q, k, v), weights, strict=True)
    )
    q, k = (y / (y.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    f = f @ p["forget_gate.f_b_proj.weight"].T + p["forget_gate.dt_bias"]
    rate = p["forget_gate.A_log"].exp().view(heads, 1)
    alpha = (-rate * torch.log1p(f.exp()).unflatten(-1, (heads, head_dim))).exp()
    beta, eye = torch.sigmoid(b), torch.eye(head_dim, dtype=q.dtype)
    s, rows = q.new_zeros(len(q), heads, head_dim, head_dim), []
    for t in range(q.shape[1]):
        step = beta[:, t, :, None, None]
        kk = k[:, t, :, :, None] * k[:, t, :, None, :]
        s = (eye - step * kk) @ (alpha[:, t, ..., None] * s)
        s = s + step * k[:, t, :, :, None] * v[:, t, :, None, :]
        rows.append((q[:, t, :, None, :] @ s)[..., 0, :] / head_dim**0.5)
    z = (z @ p["g_b_proj.weight"].T).unflatten(-1, (heads, head_dim))
    o = rms(torch.stack(rows, dim=1), eps) * p["o_norm.weight"] * torch.sigmoid(z)
    return o.flatten(-2), s


def mamba(columns, p, *, state):
    """arXiv 2312.00752 algorithm 2: dt, B and C are made from the convolved x; one decay per channel and state."""
    x, z = columns.chunk(2, dim=-1)
    x = F.silu(convolved(x, p["conv1d.weight"], p["conv1d.bias"]))
    rank = p["x_proj.weight"].shape[0] - 2 * state
    dt, b, c = (x @ p["x_proj.weight"].T).split([rank, state, state], dim=-1)
    dt = torch.log1p((dt @ p["dt_proj.weight"].T + p["dt_proj.bias"]).exp())
    a = -p["A_log"].exp()
    h, rows = columns.new_zeros(len(columns), *a.shape), []
    for t in range(columns.shape[1]):
        h = (dt[:, t, :, None] * a).exp() * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None, :]
        rows.append((h * c[:, t, None, :]).sum(-1) + p["D"] * x[:, t])
    return torch.stack(rows, dim=1) * F.silu(z), h


def short_conv(columns, p):
    """LFM2: y = C * conv(B * x)."""
    b, c, x = columns.chunk(3, dim=-1)
    return c * convolved(b * x, p["conv.weight"]), None
