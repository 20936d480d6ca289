"""What `lora` and `qlora` share: which matrices get an adapter, and peft's layer around each.

    y = base(x) + s B A x,    s = alpha / r,  or alpha / sqrt(r) with rslora

The layers are peft's own (`peft.tuners.lora.Linear`), so names of tensors, scaling, initialisation
and DoRA are peft's; peft's model-level surgery is not used, because it would freeze the tensors that
the teacher shares.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context, Wrapper, innermost, tensor_kind
from mismatch.mechanisms.parts.linears import (
    ALL,
    LinearLayer,
    grafted,
    linear_layers,
    put,
    seed_of,
    targets,
)
from mismatch.models.quantised import bits, full

Init = bool | Literal["gaussian", "pissa", "olora"]
"""peft's `init_lora_weights`, as far as it is used here."""

ADAPTER = "default"
"""The adapter's name in peft's tables, and so in the names of the tensors: `lora_A.default.weight`."""

DEFAULT_TARGETS = (("q_proj", "v_proj"), ("qkv_proj",), ("query_key_value",), ("c_attn",))
"""Queries and values, as in the LoRA paper; where a family fuses them, the fused projection."""


class Adapted(Linear):
    """peft's layer, which merges into a full matrix where the one below it is kept in few bits.

    Rounded to few bits again, the sum would lose most of what the adapter adds to it. `unmerge` puts the rounded matrix
    back.
    """

    _below: tuple[nn.Module, ...] = ()
    """The layer in few bits while it is merged; in a tuple, so that it is no child of this module."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base: Any = self.get_base_layer()
        if not self._below and in_few_bits(base):
            self._below = (base,)
            adapter: Any = self.lora_A[ADAPTER]
            self.base_layer = full(base, adapter.weight.dtype)
            self.fan_in_fan_out = isinstance(self.base_layer, Conv1D)
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        super().unmerge()
        if self._below:
            base: Any = self.base_layer
            self.base_layer, self._below = self._below[0].to(base.weight.device), ()
            self.fan_in_fan_out = False


def in_few_bits(layer: Any) -> bool:
    """Whether no number can be written into the weight: codes, or (`qlora`) made anew at each look."""
    held = "weight" in layer._parameters or "weight" in layer._buffers
    return not held or bits(layer.weight) is not None


class LowRankAdapted(Wrapper):
    """A module in which peft's layers stand around some matrices. Subclasses define the layer below each.

    The config has `targets`, `r`, `alpha`, `dora` and `rslora`.
    """

    def __init__(self, original: nn.Module, config: Any, context: Context) -> None:
        """Raises:
        SurgeryError: a target that this module lacks, or a rank larger than the initialisation allows.
        """
        tree = grafted(original)
        wanted = config.targets or default_targets(tree, context)
        super().__init__(tree, config, context)
        for path, layer in targets(tree, wanted, context).items():
            put(tree, path, self.adapted(layer, path))

    def merged(self) -> nn.Module:
        for path, layer in list(self.original.named_modules()):
            if isinstance(layer, Adapted):
                if not layer.merged:
                    layer.merge()
                base: Any = layer.get_base_layer()
                if "weight" in base._buffers:  # a residual, which was not to be trained
                    base.weight = nn.Parameter(base._buffers.pop("weight"), requires_grad=False)
                put(self.original, path, base)
        return self.original

    def adapted(self, layer: LinearLayer, path: str) -> nn.Module:
        """peft's layer around this mechanism's stand-in for `layer`."""
        raise NotImplementedError

    def with_lora(self, base: Any, path: str, init: Init = True) -> nn.Module:
        """peft's LoRA layer around `base`, its draws seeded by slot and path.

        Args:
            base: the layer that computes the matrix product.
            path: of the layer in the module.
            init: as peft's `init_lora_weights`.
        """
        settings = self.settings
        config = LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            use_dora=settings.dora,
            use_rslora=settings.rslora,
            init_lora_weights=init,
            fan_in_fan_out=isinstance(base, Conv1D),
        )
        # Drawn on the CPU whatever the device, so that a GPU run starts from the same numbers.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed_of(self.context, path))
            layer = Adapted(base, ADAPTER, config, r=settings.r, lora_alpha=settings.alpha)
        if bits(base.weight):  # peft takes the dtype of the weight below, and this one has none
            layer.lora_A.to(**tensor_kind(base, self.context))
            layer.lora_B.to(**tensor_kind(base, self.context))
        return layer


def default_targets(tree: nn.Module, context: Context) -> tuple[str, ...]:
    """Queries and values of an attention or a block, every matrix of an MLP.

    Raises:
        SurgeryError: a module without any of those names.
    """
    if context.slot == "mlp":
        return (ALL,)
    ends = {path.rpartition(".")[2] for path in linear_layers(tree)}
    for names in DEFAULT_TARGETS:
        if set(names) <= ends:
            return names
    raise SurgeryError(
        f"{context.where}: {type(innermost(tree)).__name__} has no projections of queries and "
        "values to adapt",
        hint=f"name the targets: {', '.join(linear_layers(tree)) or 'it has no linear layer'}",
    )
