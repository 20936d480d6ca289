"""lora: a low-rank matrix, trained, beside some of the module's own matrices.

    y = W x + s B A x,   A: r x in, B: out x r,   s = alpha / r  (rslora: alpha / sqrt(r))
    dora:  y = m * (W + s B A) x / ||W + s B A||     m: one length per output, from W at the start

Sources: LoRA arXiv 2106.09685 (section 4.1), DoRA 2402.09353 (eq. 5), rsLoRA 2312.03732, PiSSA
2404.02948, OLoRA 2406.01775. The layers are peft's. No dropout.

| init | A | B | W |
|---|---|---|---|
| `kaiming` | uniform, as `torch.nn.Linear` | 0 | the teacher's |
| `gaussian` | normal, standard deviation 1 / r | 0 | the teacher's |
| `pissa` | its r largest singular directions, halves of them | the other halves | a copy less s B A |
| `olora` | R of W = QR, its first r rows | Q, its first r columns | a copy less s B A |

Inherited: every tensor of the module (with pissa and olora all but the targets' weights). New: A, B,
with dora m. Dropped: nothing; with pissa and olora the targets' weights. A residual replaces them, a
buffer that is not trained: the tensor that the teacher shares is never written to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.parts.linears import LinearLayer, dense, matrix
from mismatch.mechanisms.parts.lora_layers import Init, LowRankAdapted
from mismatch.models.quantised import bits

PEFT_INIT: dict[str, Init] = {
    "kaiming": True,
    "gaussian": "gaussian",
    "pissa": "pissa",
    "olora": "olora",
}
FROM_WEIGHT = ("pissa", "olora")


@dataclass(frozen=True)
class LoRAConfig:
    r: Annotated[int, ">= 1"] = 8
    """Rank of the added matrix."""
    alpha: Annotated[float, "> 0"] = 16.0
    """Scale of the added matrix, divided by r (by its root with rslora)."""
    targets: tuple[str, ...] | None = None
    """Linear layers by name, `[all]` for every one; none = queries and values, in an MLP all."""
    dora: bool = False
    """Train the length of each output's weights apart from their direction."""
    rslora: bool = False
    """Divide alpha by the root of r, not by r."""
    init: Literal["kaiming", "gaussian", "pissa", "olora"] = "kaiming"
    """How A and B start."""


class LoRA(LowRankAdapted):
    """The module with peft's LoRA layers around its targets."""

    Config = LoRAConfig
    slots = ("attn", "mlp", "block")
    identity = "at the start; with init=pissa and init=olora up to rounding"
    state = "the original's"
    source = "arXiv 2106.09685; layers: peft"
    stacks = True
    merges = True

    def adapted(self, layer: LinearLayer, path: str) -> nn.Module:
        init = PEFT_INIT[self.settings.init]
        if self.settings.dora and bits(layer.weight) == 8:
            raise SurgeryError(
                f"{self.context.where}: `{path}` is kept in 8 bits, where peft's DoRA cannot read its lengths",
                hint="dora=false, or load the model in 4 bits or without quantisation",
            )
        if self.settings.init not in FROM_WEIGHT:
            return self.with_lora(layer, path, init)
        copy = frozen_copy(dense(layer, self.context))
        if self.settings.r > min(copy.weight.shape):
            raise SurgeryError(
                f"{self.context.where}: init={self.settings.init} takes {self.settings.r} "
                f"directions out of `{path}`, a matrix of {copy.out_features} x "
                f"{copy.in_features}",
                hint=f"take r <= {min(copy.weight.shape)}, or init=kaiming",
            )
        # Without weights there is nothing to decompose: placeholders of the right shape.
        empty = copy.weight.is_meta or self.context.restoring
        return self.with_lora(copy, path, True if empty else init)

    def notes(self) -> tuple[str, ...]:
        if self.settings.init not in FROM_WEIGHT:
            return ()
        return (
            f"init={self.settings.init} takes its directions out of the weight: the targets' "
            "weights are copies, frozen; the teacher's stay as they are",
        )


def frozen_copy(layer: LinearLayer) -> nn.Linear:
    """The layer as `torch.nn.Linear` with a copy of its weight, a buffer; the bias is shared."""
    out_features, in_features = matrix(layer).shape
    copy = nn.Linear(in_features, out_features, bias=False, device="meta")
    del copy.weight
    copy.register_buffer("weight", matrix(layer).clone())
    copy.bias = layer.bias
    return copy
