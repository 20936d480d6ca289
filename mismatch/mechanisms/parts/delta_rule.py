"""The generalised delta rule with a decay per channel, chunk by chunk.

For a state S, `K V` (keys by values), and per token r, k, a, b (`K`), v (`V`), w in (0, 1] (`K`):

    S_t = diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
    y_t = S_t^T r_t

a = b = 0 is gated linear attention; a = -k, b = beta k the delta rule (DeltaNet); a = -kappa,
b = eta kappa RWKV-7 (arXiv 2503.14456, whose matrix is the transpose of this one).

A chunk at once (WY / UT transform, as arXiv 2406.06484 and 2412.06464 do for DeltaNet and its gated
form): with G_t the product of w from the chunk's start to t, and u_t = a_t^T S_{t-1} what token t
takes from the state,

    u_t = (a_t G_{t-1}) S_0 + sum_{j<t} (a_t G_{t-1} / G_j . k_j) v_j + (a_t G_{t-1} / G_j . b_j) u_j

is a unit lower triangular system in the u of the chunk. Solved once for S_0 = 1 and 0, it gives the
chunk's end state as M S_0 + N, and only that product runs chunk after chunk.

Precision: G and 1 / G are formed, so |log w| times the chunk must stay far from the 88 at which
float32 ends (RWKV-7: 0.6065 * 32 = 19). Every term of a sum is a product of them, right to about
|log G| ulp, and those that count are <= 1 times their operands: nothing cancels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32  # on a CPU, for 64 x 64 states: 16 takes 1.4 times as long, 64 no less


def chunked_delta_rule(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The recurrence over a text of any length, from any state.

    Args:
        r, k, a, b: `batch heads pos K`.
        log_w: log of w, <= 0, `batch heads pos K`. A token with log_w = 0 and k = a = b = 0 leaves
            the state as it is.
        v: `batch heads pos V`.
        state: S before the first token, `batch heads K V`.
        chunk: tokens at once; a matter of speed only.

    Returns:
        y `batch heads pos V`, and S after the last token, `batch heads K V`.
    """
    length = r.shape[2]
    chunk = min(chunk, length)
    count = -(-length // chunk)
    missing = count * chunk - length
    r, log_w, k, v, a, b = (
        (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (count, chunk))
        for x in (r, log_w, k, v, a, b)
    )
    decay = log_w.cumsum(-2)  # log G_t
    end = decay[..., -1:, :].exp()
    shrink = (-decay).exp()
    reads = torch.cat([a * (decay - log_w).exp(), r * decay.exp()], dim=-2)
    writes = torch.cat([k * shrink, b * shrink], dim=-2)
    scores = reads @ writes.transpose(-1, -2)
    takes, puts = scores.split(chunk, dim=-2)
    a_k, a_b = takes.tril(-1)[..., :chunk], takes[..., chunk:].tril(-1)
    r_k, r_b = puts[..., :chunk].tril(), puts[..., chunk:].tril()
    a_in, r_in = reads.split(chunk, dim=-2)

    # u = from_state S_0 + alone, both at once
    solved = torch.linalg.solve_triangular(
        -a_b, torch.cat([a_in, a_k @ v], dim=-1), upper=False, unitriangular=True
    )
    from_state, alone = solved.split([a.shape[-1], v.shape[-1]], dim=-1)
    k_end, b_end = (writes * end).transpose(-1, -2).split(chunk, dim=-1)
    step = torch.diag_embed(end.squeeze(-2)) + b_end @ from_state
    added = k_end @ v + b_end @ alone

    states = [state]
    # Unbound, not indexed: the gradient of one index is as large as the whole.
    for m, n in zip(step.unbind(2), added.unbind(2), strict=True):
        states.append(m @ states[-1] + n)
    before = torch.stack(states[:-1], dim=2)
    y = (r_in + r_b @ from_state) @ before + r_k @ v + r_b @ alone
    return y.flatten(2, 3)[:, :, :length], states[-1]
