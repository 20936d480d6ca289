"""The quantised layers of a checkpoint. The file decides which matrices are kept in few bits, not the config.

A replaced module may hold matrices in codes (a wrapper around the teacher's), in full (redrawn, factored, trained), or
both. So the plain model is built with full matrices wherever the file has no codes under that name (`without_codes`),
the swaps are made again, and what the file holds in codes becomes a quantised layer then (`put_codes`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from mismatch.mechanisms.parts.linears import linear_layers, put
from mismatch.models.folder import check_safetensors
from mismatch.models.quantised import settings_of, settle
from mismatch.models.skeleton import skeleton

STATE = ".weight.quant_state."
"""In a name beside those of 4 bits: how the codes are to be read."""
SCALES = ".SCB"
"""Ends a name beside those of 8 bits."""


def without_codes(config: PretrainedConfig, files: Iterable[Path]) -> PretrainedConfig:
    """The config of the plain model, in which only those layers are quantised whose codes are in the files."""
    if not getattr(config, "quantization_config", None):
        return config
    held = in_codes(name for file in files for name in check_safetensors(file))
    full = [path for path in linear_layers(skeleton(config)) if path not in held]
    config = copy.deepcopy(config)
    # A mapping, as it stands in config.json: what transformers takes in every version.
    config.quantization_config = settings_of(config).to_dict() | {"llm_int8_skip_modules": full}
    return config


def in_codes(names: Iterable[str]) -> set[str]:
    """Paths of the quantised layers whose tensors have these names."""
    return {
        n.partition(STATE)[0].removesuffix(SCALES)
        for n in names
        if STATE in n or n.endswith(SCALES)
    }


def of_codes(names: Iterable[str]) -> set[str]:
    """Which of these names are of quantised layers: the codes, and what says how to read them."""
    names = set(names)
    held = in_codes(names)
    return {n for n in names if n.partition(".weight")[0].removesuffix(SCALES) in held}


def put_codes(
    model: nn.Module,
    names: Iterable[str],
    read: Callable[[str], Tensor],
) -> set[str]:
    """Make a quantised layer of each full one whose codes are in the file.

    Args:
        model: rebuilt; what was not replaced is as in the file.
        names: of the checkpoint's tensors, second names included.
        read: the tensor of such a name.

    Returns:
        The names of tensors that are in place: all of every quantised layer, but its bias.
    """
    names = list(names)
    held, made = in_codes(names), {}
    layers = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if path in held]
    for path, layer in layers:
        if isinstance(layer, nn.Linear | Conv1D) and type(layer) in (nn.Linear, Conv1D):
            if layer not in made:
                inside = [n for n in names if n.startswith(f"{path}.")]
                tensors = {n.removeprefix(f"{path}."): read(n) for n in inside}
                made[layer] = _quantised(layer, model.config, tensors)
            put(model, path, made[layer])
    settle(model)
    return of_codes(names)


def _quantised(layer: nn.Linear | Conv1D, config: Any, tensors: dict[str, Tensor]) -> nn.Module:
    """A layer of bitsandbytes in place of `layer`, as transformers would have built it; the bias is shared."""
    from bitsandbytes.nn import Int8Params, Params4bit
    from transformers.integrations import replace_with_bnb_linear

    holder: Any = nn.Module()
    holder.layer = layer
    replace_with_bnb_linear(holder, [], settings_of(config), pre_quantized=True)
    new, device = holder.layer, layer.weight.device
    weight = tensors["weight"].to(device)
    if (scales := tensors.get(SCALES[1:])) is not None:
        new.weight = Int8Params(weight, requires_grad=False, CB=weight, SCB=scales.to(device))
    else:
        facts = {n: t for n, t in tensors.items() if n.startswith("weight.")}
        new.weight = Params4bit.from_prequantized(
            weight, facts, requires_grad=False, device=device, module=new
        )
    new.bias = layer.bias
    return new.train(layer.training)
