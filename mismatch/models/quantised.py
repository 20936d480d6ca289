"""Weights that bitsandbytes keeps in 4 or 8 bits. No import of bitsandbytes: its classes are told by their names.

Such a layer is a `torch.nn.Linear` whose `weight` holds codes, not numbers, and the scales beside them. In 4 bits the
codes lie two a byte in a column, whatever the shape of the matrix (and under the name of any dtype, `quant_storage`).
What needs the numbers takes `numbers`; what has to write them takes `full`, an ordinary layer.

Three things that bitsandbytes does by itself would show as a difference that no swap made; `settle` sees to them:

    4 bits, CPUs with AVX512-BF16    the first forward in eval mode packs the codes anew, rounds the scales to bfloat16,
                                     and passes no gradient from then on; reading the state rounds them again
    8 bits                           the first forward moves codes and scales from the weight into the layer, so that a
                                     second layer over the same weight has none
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

# Of an optional kernel that could not be fetched from the hub, and of every forward in 8 bits.
for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(name).setLevel(logging.ERROR)

FOUR, EIGHT = "Params4bit", "Int8Params"
LEVELS_8BIT = 127  # the largest code stands for the row's scale


def bits(weight: Tensor | None) -> int | None:
    """How many bits a value of this parameter takes, 4 or 8; None for one that holds numbers."""
    kind = type(weight).__name__
    if kind == FOUR and weight.bnb_quantized:  # type: ignore[union-attr]
        return 4
    return 8 if kind == EIGHT and not weight.is_floating_point() else None  # type: ignore[union-attr]


def quantised(tree: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every layer of a tree whose weight is quantised, by its dotted path."""
    for path, module in tree.named_modules():
        if isinstance(module, nn.Linear) and bits(getattr(module, "weight", None)):
            yield path, module


def is_quantised(tree: nn.Module) -> bool:
    """Whether any layer of it is."""
    return next(quantised(tree), None) is not None


def values(parameter: Tensor) -> int:
    """How many numbers a parameter stands for."""
    return parameter.quant_state.shape.numel() if bits(parameter) == 4 else parameter.numel()  # type: ignore[attr-defined]


@torch.no_grad()
def numbers(layer: nn.Module) -> Tensor:
    """The weight of a layer as numbers, `out in`; of a quantised one made anew, float32."""
    known: Any = layer
    weight = known.weight
    if bits(weight) is None:
        return weight.detach()
    import bitsandbytes

    if bits(weight) == 4:
        settle(layer)
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    scales = weight.SCB if weight.SCB is not None else known.state.SCB
    return weight.data.float() * (scales.float() / LEVELS_8BIT)[:, None]


def full(layer: nn.Module, dtype: torch.dtype) -> nn.Linear | Conv1D:
    """An ordinary layer with a copy of the numbers, of the class that was quantised; it shares the bias."""
    known: Any = layer
    new = nn.Linear(known.in_features, known.out_features, bias=False, device="meta")
    new.weight = nn.Parameter(numbers(layer).to(dtype, copy=True), requires_grad=False)
    new.bias = known.bias
    new.train(layer.training)
    return as_conv1d(new) if getattr(known, "source_cls", None) is Conv1D else new


def as_conv1d(layer: nn.Linear) -> Conv1D:
    """The same layer as gpt2 has them: with its weight as `in out`."""
    new = Conv1D(layer.out_features, layer.in_features).to("meta")
    new.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
    new.bias = layer.bias
    return new.train(layer.training)


def unpacked(tree: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The tree with an ordinary layer in place of every quantised one; the tree itself may be one."""
    for path, layer in list(quantised(tree)):
        if not path:
            return full(layer, dtype)
        parent, _, name = path.rpartition(".")
        setattr(tree.get_submodule(parent), name, full(layer, dtype))
    return tree


def settle(model: nn.Module) -> None:
    """Keep bitsandbytes from changing a model's weights while it runs; see the top of the file."""
    for _, layer in quantised(model):
        known: Any = layer
        if bits(layer.weight) == 4:
            known.support_avx512bf16_for_cpu = False
            known.weight.module = known  # of a copied weight it is the layer of the first one
            if getattr(known.weight.quant_state, "packing_format_for_cpu", False):
                known.state_dict()  # unpacks in place
        elif known.weight.CB is not None:
            known.init_8bit_state()


def settings_of(config: Any) -> BitsAndBytesConfig:
    """How a model is quantised, by its config; a change of it is one of the config."""
    if isinstance(config.quantization_config, Mapping):  # as it stands in config.json
        config.quantization_config = BitsAndBytesConfig.from_dict(config.quantization_config)
    return config.quantization_config


def carried(model: nn.Module) -> Iterator[Tensor]:
    """Tensors of quantised layers that are neither parameters nor buffers, of 8-bit ones."""
    for _, layer in quantised(model):
        state: Any = getattr(layer, "state", None)
        yield from (
            t for t in (getattr(state, "CB", None), getattr(state, "SCB", None)) if t is not None
        )
