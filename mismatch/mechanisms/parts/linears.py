"""The linear layers inside a module, and a second module tree in which some of them are replaced.

Adapters and low-rank factors go around or in place of single matrices of an attention, an MLP or a block. The module
that is replaced must not change (`parallel` runs it beside the new one), so they are put into a graft: a second tree of
modules over the same tensors.

| class | weight | families |
|---|---|---|
| `torch.nn.Linear` | `out in` | all but gpt2 |
| `transformers.pytorch_utils.Conv1D` | `in out` | gpt2 |
| `bitsandbytes.nn.Linear4bit`, `Linear8bitLt` | codes; `dense` gives the numbers | any that is quantised |
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context, tensor_kind
from mismatch.models import quantised
from mismatch.models.private import configs_of

LinearLayer = nn.Linear | Conv1D

ALL = "all"
"""As a target: every linear layer of the module."""


def grafted(tree: nn.Module) -> nn.Module:
    """A second tree of modules over the same parameters, buffers and model config."""
    quantised.settle(tree)
    tensors = chain(tree.parameters(), tree.buffers(), quantised.carried(tree))
    return copy.deepcopy(tree, {id(one): one for one in chain(tensors, configs_of(tree))})


@dataclass(frozen=True)
class Columns:
    """Some columns of its input, or all: stands where a module had a projection."""

    start: int = 0
    stop: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return x[..., self.start : self.stop]


def stand_in(module: nn.Module, name: str, instead: Callable[[Tensor], Tensor]) -> None:
    """Put something without weights where a module has a projection. It is no child of it, so who looks for projections
    by name (peft's `target_modules`) finds those with weights alone; an `nn.Identity` can still be hooked."""
    delattr(module, name)
    vars(module)[name] = instead


def linear_layers(tree: nn.Module) -> dict[str, LinearLayer]:
    """Every linear layer of a module by its dotted path, in the order of the tree."""
    return {name: m for name, m in tree.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def targets(tree: nn.Module, wanted: Sequence[str], context: Context) -> dict[str, LinearLayer]:
    """The linear layers that `wanted` names, by path. A name is the end of a path (`q_proj`,
    `mlp.c_proj`), or `all`.

    Raises:
        SurgeryError: a name that no linear layer of this module has, or a module without any (experts keep
            their matrices stacked in one tensor).
    """
    layers = linear_layers(tree)
    if not layers:
        raise SurgeryError(
            f"{context.where}: {type(tree).__name__} has no linear layer to adapt",
            hint="put it into the `attn` slot",
        )
    if tuple(wanted) == (ALL,):
        return layers
    found: dict[str, LinearLayer] = {}
    for name in wanted:
        ends = {path: m for path, m in layers.items() if f".{path}".endswith(f".{name}")}
        if not ends:
            raise SurgeryError(
                f"{context.where}: {type(tree).__name__} has no linear layer `{name}`",
                hint=f"its linear layers: {', '.join(layers) or 'none'}; `{ALL}` means every one",
            )
        found |= ends
    return found


def put(tree: nn.Module, path: str, module: nn.Module) -> None:
    """Set the module at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(tree.get_submodule(parent), name, module)


def dense(layer: LinearLayer, context: Context) -> LinearLayer:
    """The layer; for a quantised one an ordinary layer with its numbers, in the dtype of the model."""
    if not quantised.bits(layer.weight):
        return layer
    return quantised.full(layer, tensor_kind(layer, context)["dtype"])


def width(layer: LinearLayer) -> int:
    """How many outputs it has."""
    return layer.nf if isinstance(layer, Conv1D) else layer.out_features


def matrix(layer: LinearLayer) -> Tensor:
    """The weight as `out in`, a view of it and outside autograd. Not of a quantised layer: see `dense`."""
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def affine(layer: LinearLayer, context: Context) -> Tensor:
    """Weight and bias (0 where there is none) as `out in+1`, float64, outside autograd; of a quantised layer too."""
    weight = matrix(dense(layer, context)).double()
    bias = layer.bias
    column = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
    return torch.cat([weight, column[:, None]], dim=1)


def linear(weight: Tensor, bias: Tensor | None, kind: dict[str, Any]) -> nn.Linear:
    """A linear layer of these numbers.

    Args:
        weight: `out in`.
        bias: `out`; a parameter is kept as it is.
        kind: dtype and device of new tensors.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(**kind).contiguous())
    if bias is not None and not isinstance(bias, nn.Parameter):
        bias = nn.Parameter(bias.to(**kind).contiguous())
    layer.register_parameter("bias", bias)
    return layer


def generator(context: Context, name: str) -> torch.Generator:
    """The random generator of one new tensor: it depends on seed, slot and name, never on the order
    in which tensors are made."""
    return torch.Generator().manual_seed(seed_of(context, name))


def seed_of(context: Context, name: str) -> int:
    """A seed for one new tensor (or module) of the mechanism built here."""
    return zlib.crc32(f"{context.seed}/{context.where}/{name}".encode())
