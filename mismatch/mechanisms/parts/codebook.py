"""A codebook of keys: far tokens are counted at the few keys that they are most like, and a query meets these.

    phi_m(k) = softmax_m(-|k - c_m|^2 / (2 t))      psi_m(q) = exp(cap(scaling q.c_m))      m = 1 .. codes, by kv head

Then psi(q).phi(k) stands for exp(cap(scaling q.k)): it is that where k is a code, and elsewhere a mean of it over the
codes around k. Sums of phi(k) and phi(k) v^T are all that is kept of any number of tokens. Queries and keys are taken
before the rotary embedding: a code has no place in the text.

    c    k-means of the keys that the attention made of calibration text (scipy's, k-means++, seeded)
    t    SOFT times the mean square by which a key differs from its code, by channel; as a logarithm, so that it trains

psi is unbounded, so its logarithm travels until `lowered` takes off what far and near tokens share.
"""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from mismatch.errors import ConfigError, NumericsError
from mismatch.mechanisms.base import Context, need_calibration, tensor_kind
from mismatch.mechanisms.parts.linears import seed_of
from mismatch.mechanisms.parts.projections import AttentionParts

UNBALANCED = (
    "decay and balance of the codebook are not set, and far tokens weigh too much: `mismatch repair --stages "
    "inherit,closed-form` sets them"
)
SOFT = 4.0
"""Codes are broad: a key counts at all that are nearly as near."""
ROUNDS = 20
"""Of k-means."""
LARGEST = 60.0
"""Logarithm of psi once it is lowered, at most: its products with sums of many tokens stay finite in float32."""
REACHED = (0.005, 0.98)
"""Shares of far tokens that are aimed at."""
WIDEST, HALVINGS = 8.0, 40
"""Of the search for mix: how far it goes on both sides of 0, and its steps."""
NARROWEST = 1e-6
"""t, at least, of the mean square of the keys: of keys that are codes it would be 0."""


class InputSample:
    """All inputs of a module on calibration text but those of each window's first tokens.

    Args:
        skipped: how many of those.
    """

    def __init__(self, skipped: int) -> None:
        self.skipped = skipped
        self.found: list[Tensor] = []

    def update(self, inputs: Tensor, outputs: Tensor, keep: Tensor) -> None:
        """As `Calibrator.update`."""
        self.found.append(inputs[:, self.skipped :].flatten(0, 1).cpu())

    def tokens(self) -> Tensor:
        """`tokens d_model`."""
        return torch.cat(self.found)


class Codebook(nn.Module):
    """The codes of each kv head.

    Attributes:
        codes: `KV codes D`.
        spread: log t, `KV`.
        tokens_each: calibration tokens that are enough for a code.
    """

    tokens_each: ClassVar[int] = 64

    def __init__(self, attention: AttentionParts, codes: int, context: Context) -> None:
        """
        Args:
            attention: its projections are the original's.
            codes: how many.

        Raises:
            ConfigError: more than there are different keys in the calibration text.
            NumericsError: a key that is no number.
            SurgeryError: no calibration.
        """
        super().__init__()
        kind = tensor_kind(attention, context)
        measured = need_calibration(attention, context, "linear_attention(feature_map=codebook)")
        found = torch.zeros(attention.n_kv_heads, codes, attention.head_dim)
        spread = torch.zeros(attention.n_kv_heads)
        if measured is not None:
            with torch.no_grad():
                keys = attention.qkv(measured.tokens().to(**kind)[None])[1][0]
            each = [
                fitted(one, codes, seed_of(context, f"codes/{h}")) for h, one in enumerate(keys)
            ]
            found, spread = (torch.stack(part) for part in zip(*each, strict=True))
        self.codes = nn.Parameter(found.to(**kind))
        self.spread = nn.Parameter(spread.to(**kind))

    def forward(self, k: Tensor) -> Tensor:
        """phi: `batch KV pos D` -> `batch KV pos codes`, dtype of k."""
        codes, spread = self.codes.to(k.dtype), self.spread.to(k.dtype)
        # |k|^2 is the same for all codes.
        away = 0.5 * codes.square().sum(-1)[:, None] - k @ codes.transpose(-1, -2)
        return (-away / spread.exp()[:, None, None]).softmax(-1)

    def logits(self, q: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """log psi: `batch H pos D` -> `batch H pos codes`, dtype of q; query head h meets the codes of kv head
        h // (H / KV)."""
        codes = self.codes.to(q.dtype)
        grouped = q.unflatten(1, (len(codes), -1))
        logits = (grouped @ codes[:, None].transpose(-1, -2) * scaling).flatten(1, 2)
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    def extra_repr(self) -> str:
        return f"codes={self.codes.shape[1]}"


def lowered(logits: Tensor, seen: Tensor, most: Tensor | None) -> tuple[Tensor, Tensor]:
    """psi, divided by the largest weight that any code, as often as it was seen, or near token has for a query.

    Args:
        logits: log psi, `batch KV chunks group*C codes`.
        seen: sums of phi over what each query meets, `batch KV chunks C codes`.
        most: logarithm of the largest near weight, `batch KV chunks group C 1`; None = there is none.

    Returns:
        psi of the shape of logits, and the logarithm of what it was divided by, of the shape of most.
    """
    logits = logits.unflatten(3, (-1, seen.shape[3]))
    top = (logits + seen[:, :, :, None].log()).detach().amax(-1, keepdim=True)
    if most is not None:
        top = torch.maximum(top, most.detach())
    # Larger is a code that was hardly seen, or never: what it meets is 0 or nearly.
    return (logits - top).clamp(max=LARGEST).exp().flatten(3, 4), top


def balanced(shares: Tensor, mix: Tensor, wanted: Tensor) -> Tensor:
    """mix of each head at which far tokens have the share that is wanted, in the mean: float64 `H`.

    Args:
        shares: of the far tokens at `mix`, `H tokens`; a share is sigmoid(its logit - mix).
        mix: as it is.
        wanted: shares, `H`.
    """
    logits, wanted = shares.logit() + mix[:, None], wanted.clamp(*REACHED)
    low, high = torch.full_like(wanted, -WIDEST), torch.full_like(wanted, WIDEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_much = torch.sigmoid(logits - middle[:, None]).mean(1) > wanted
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return (low + high) / 2


def fitted(keys: Tensor, codes: int, seed: int) -> tuple[Tensor, Tensor]:
    """k-means of one head's keys.

    Args:
        keys: `tokens D`.
        seed: of the codes that it begins with.

    Returns:
        codes `codes D` and log t, float64.

    Raises:
        ConfigError: fewer different keys than codes.
        NumericsError: a key that is no number.
    """
    points = keys.double().cpu()
    if not points.isfinite().all():
        raise NumericsError(
            "the keys of the calibration text hold NaN or infinity",
            hint="load the model in a wider dtype: --dtype float32",
        )
    different = len(points.unique(dim=0))
    if different < codes:
        raise ConfigError(
            f"`codes={codes}` are k-means of keys, and the calibration text has {len(points)} tokens with {different} "
            "different keys in a head",
            hint="fewer codes, or more calibration text (--calibration-tokens)",
            argument="codes",
        )
    with warnings.catch_warnings():  # of a code that no key is nearest to: it stays where it is
        warnings.simplefilter("ignore", UserWarning)
        found, _ = kmeans2(points.numpy(), codes, iter=ROUNDS, minit="++", seed=seed)
    made = torch.from_numpy(found)
    lost = torch.cdist(points, made).amin(1).square().mean() / points.shape[1]
    return made, (SOFT * lost).clamp(min=NARROWEST * points.square().mean()).log()
